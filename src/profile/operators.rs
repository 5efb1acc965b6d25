//! ONNX Runtime's own profiles, summed by the part of the model that each operator belongs to.
//!
//! A profile is a JSON array of events; those of category `Node` whose names end in `_kernel_time` say how many microseconds an
//! operator took. The node's name tells the part: the exporter names nodes after the checkpoint's modules, and nodes that ONNX
//! Runtime has fused keep the name of one of them. Files may have a million events, so they are read one event at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};

use crate::error::{Error, Result};
use crate::profile::{OperatorProfile, RegionProfile};

/// Graphs by their files' names.
const GRAPHS: [&str; 3] = ["vision_tower", "projector", "decoder"];
/// Words in a node's name, and the part of the model they stand for; the first that is found counts.
const REGIONS: [(&str, &str); 17] = [
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("attention", "attention"),
    ("qkv", "attention"),
    ("positions", "attention"),
    ("mlp", "MLP"),
    ("fc1", "MLP"),
    ("fc2", "MLP"),
    ("lm_head", "logits"),
    ("logits", "logits"),
    ("next_ids", "logits"),
    ("embed", "embedding"),
    ("patch", "embedding"),
    ("projector", "projector"),
    ("linear", "projector"),
    ("/last", "logits"),
    ("/next", "logits"),
];

/// Sums all profiles in `folder`.
///
/// # Errors
/// [`Error::Io`] when a file cannot be read, [`Error::Setting`] when it is not a profile, or there is none.
pub(crate) fn read_profiles(folder: &Path) -> Result<OperatorProfile> {
    let mut sums = Sums::default();
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(graph) = GRAPHS.into_iter().find(|graph| name.contains(graph)) else { continue };
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        sums.add(graph, BufReader::new(file)).map_err(|error| Error::Setting {
            reason: format!("`{name}`: not a profile of ONNX Runtime: {error}"),
            hint: "leave out --ort-profile".to_owned(),
        })?;
    }
    Ok(sums.finish())
}

/// An event, as far as it matters.
#[derive(Deserialize)]
struct Event {
    cat: String,
    name: String,
    /// Microseconds.
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    #[serde(default)]
    op_name: Option<String>,
}

#[derive(Default)]
struct Sums {
    regions: BTreeMap<(&'static str, &'static str), RegionProfile>,
    run_seconds: f64,
}

impl Sums {
    fn add(&mut self, graph: &'static str, input: impl std::io::Read) -> serde_json::Result<()> {
        let mut deserializer = serde_json::Deserializer::from_reader(input);
        deserializer.deserialize_seq(Events { graph, sums: self })?;
        deserializer.end()
    }

    fn count(&mut self, graph: &'static str, event: Event) {
        if event.cat == "Session" && event.name == "model_run" {
            self.run_seconds += event.dur / 1e6;
        }
        let Some(node) = event.name.strip_suffix("_kernel_time").filter(|_| event.cat == "Node") else { return };
        let operator = event.args.op_name.unwrap_or_else(|| "unknown".to_owned());
        let region = region(node);
        let sum = self.regions.entry((graph, region)).or_default();
        sum.num_calls += 1;
        sum.seconds += event.dur / 1e6;
        *sum.operators.entry(operator).or_default() += event.dur / 1e6;
    }

    fn finish(self) -> OperatorProfile {
        let seconds: f64 = self.regions.values().map(|region| region.seconds).sum();
        let named = self.regions.into_iter().map(|((graph, region), sum)| RegionProfile {
            graph: graph.to_owned(),
            region: region.to_owned(),
            share: sum.seconds / seconds.max(1e-9),
            ..sum
        });
        let mut regions: Vec<RegionProfile> = named.collect();
        regions.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        OperatorProfile { regions, seconds, run_seconds: self.run_seconds }
    }
}

/// The part of the model that a node belongs to.
fn region(node: &str) -> &'static str {
    let found = REGIONS.into_iter().find(|(word, _)| node.contains(word));
    found.map_or("other", |(_, region)| region)
}

struct Events<'a> {
    graph: &'static str,
    sums: &'a mut Sums,
}

impl<'de> Visitor<'de> for Events<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut events: A) -> std::result::Result<(), A::Error> {
        // What is no event of this form is passed over.
        while let Some(event) = events.next_element::<Either>()? {
            if let Either::Event(event) = event {
                self.sums.count(self.graph, event);
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Either {
    Event(Event),
    Other(IgnoredAny),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events of ONNX Runtime 1.31.1, shortened.
    const EVENTS: &str = r#"[
        {"cat":"Session","pid":7,"tid":9,"dur":900,"ts":2,"ph":"X","name":"model_loading_uri","args":{}},
        {"cat":"Session","pid":7,"tid":9,"dur":100,"ts":5,"ph":"X","name":"model_run","args":{}},
        {"cat":"Node","pid":7,"tid":9,"dur":1,"ts":6,"ph":"X","name":"/layers.0.mlp/Mul_fence_before","args":{"op_name":"Mul"}},
        {"cat":"Node","pid":7,"tid":9,"dur":30,"ts":6,"ph":"X","name":"/layers.0.mlp.gate_proj/Gemm_kernel_time","args":{"op_name":"Gemm","node_index":"3"}},
        {"cat":"Node","pid":7,"tid":9,"dur":50,"ts":6,"ph":"X","name":"/layers.0.self_attn/GroupQueryAttention_kernel_time","args":{"op_name":"GroupQueryAttention"}},
        {"cat":"Node","pid":7,"tid":9,"dur":10,"ts":6,"ph":"X","name":"/layers.1.mlp/Mul_kernel_time","args":{"op_name":"Mul"}},
        {"odd":true}
    ]"#;

    #[test]
    fn operators_are_summed_by_region() {
        let mut sums = Sums::default();
        sums.add("decoder", EVENTS.as_bytes()).unwrap();
        sums.add("projector", EVENTS.as_bytes()).unwrap();
        let found = sums.finish();
        assert!((found.run_seconds - 200e-6).abs() < 1e-12 && (found.seconds - 180e-6).abs() < 1e-12);
        let names: Vec<_> = found.regions.iter().map(|one| (one.graph.as_str(), one.region.as_str())).collect();
        let expected = [("decoder", "attention"), ("projector", "attention"), ("decoder", "MLP"), ("projector", "MLP")];
        assert_eq!(names, expected);
        let mlp = &found.regions[2];
        assert_eq!((mlp.num_calls, mlp.operators.len()), (2, 2));
        assert!((mlp.share - 40.0 / 180.0).abs() < 1e-9, "{mlp:?}");
        assert!(Sums::default().add("decoder", &b"{}"[..]).is_err());
    }
}
