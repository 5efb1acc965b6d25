//! A report as text: aligned columns, numbers for people.

use recaption_export::{DimRange, ImageDims, TensorSpec};

use super::numbers::{bytes, count, flops};
use super::report::{CacheReport, Captioner, FlopsReport, GpuReport, GraphReport, Report, Scorer};

/// Lists are broken before this column.
const MAX_WIDTH: usize = 110;
const INDENT: &str = "  ";
/// Digits of the fingerprint that tell bundles apart.
const SHORT_FINGERPRINT: usize = 12;

/// The report, with a line break at its end.
pub(super) fn render(report: &Report) -> String {
    let mut sections = vec![header(report), graphs(report)];
    sections.extend(report.graphs.iter().map(graph));
    if let Some(Captioner { kv_cache, flops_per_image, .. }) = &report.captioner {
        let image_tokens = kv_cache.caption_tokens - flops_per_image.prompt_tokens - kv_cache.new_tokens;
        sections.push(memory(kv_cache, image_tokens, flops_per_image.prompt_tokens));
        sections.push(arithmetic(flops_per_image, image_tokens));
    }
    if report.is_verified {
        sections.push(format!("all {} files match\n", report.header.files.len()));
    }
    sections.join("\n")
}

fn header(report: &Report) -> String {
    let header = &report.header;
    let precision = match header.precision == header.vision_precision {
        true => header.precision.name().to_owned(),
        false => format!("{}, vision {}", header.precision.name(), header.vision_precision.name()),
    };
    let reduced = if header.reduce_range { ", int8 weights for processors without VNNI" } else { "" };
    let fingerprint: String = header.fingerprint.chars().take(SHORT_FINGERPRINT).collect();
    let mut rows = vec![
        ("kind", format!("{}, format {}, written by {}", header.kind.name(), header.format_version, header.producer)),
        ("source", format!("{}, layout {}", header.source.name, header.source.layout)),
        ("precision", format!("{precision}, activations {}{reduced}", header.activations.name())),
        ("target", header.target.name().to_owned()),
        ("fingerprint", fingerprint),
        (
            "size",
            format!(
                "{} parameters, {} in {} files",
                count(report.num_parameters),
                bytes(report.num_bytes),
                report.header.files.len()
            ),
        ),
    ];
    if let Some(GpuReport { provider, exception, findings }) = &report.gpu {
        let verdict = match (exception, findings.as_slice()) {
            (Some(exception), _) => (*exception).to_owned(),
            (None, []) => "has kernels for every node".to_owned(),
            (None, findings) => format!("does not run all of it: {} findings, which --json lists", findings.len()),
        };
        rows.push(("gpu", format!("{provider}: {verdict}")));
    }
    if let Some(captioner) = &report.captioner {
        rows.extend(dimensions(captioner));
    }
    if let Some(scorer) = &report.scorer {
        rows.extend(towers(scorer));
    }
    let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), plain(&value)]);
    align(rows.collect(), &[], "")
}

fn towers(scorer: &Scorer) -> [(&'static str, String); 3] {
    let Scorer { image, text, projection_dim, logit_scale } = scorer;
    let ImageDims { image_size: side, patch_size, hidden_size, num_layers } = image;
    [
        ("image", format!("{side} x {side} pixels, patches of {patch_size}, width {hidden_size}, {num_layers} layers")),
        (
            "text",
            format!(
                "{} positions, vocabulary {}, width {}, {} layers",
                text.context_length, text.vocab_size, text.hidden_size, text.num_layers
            ),
        ),
        ("embeddings", format!("width {projection_dim}, logit scale {logit_scale:.2}")),
    ]
}

fn dimensions(captioner: &Captioner) -> [(&'static str, String); 2] {
    let Captioner { vision, decoder, .. } = captioner;
    let layers: Vec<String> = vision.feature_layers.iter().map(ToString::to_string).collect();
    let state = if layers.len() == 1 { "state" } else { "states" };
    [
        (
            "vision",
            format!(
                "{side} x {side} pixels, patches of {}, width {}, MLP {}, {} layers, features of {state} {}, {} image tokens",
                vision.patch_size,
                vision.hidden_size,
                vision.intermediate_size,
                vision.num_layers,
                layers.join(", "),
                vision.num_image_tokens,
                side = vision.image_size,
            ),
        ),
        (
            "decoder",
            format!(
                "{} layers, width {}, MLP {}, {} heads of {}, {} key/value heads, vocabulary {}, {} positions",
                decoder.num_layers,
                decoder.hidden_size,
                decoder.intermediate_size,
                decoder.num_heads,
                decoder.head_dim,
                decoder.num_kv_heads,
                decoder.vocab_size,
                decoder.max_position_embeddings,
            ),
        ),
    ]
}

/// One row for each graph.
fn graphs(report: &Report) -> String {
    let titles = ["graph", "parameters", "onnx", "data", "nodes", "operator sets", "weights"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    for graph in &report.graphs {
        let opsets = graph.opsets.iter().map(|(domain, version)| format!("{domain} {version}"));
        let mut weights: Vec<_> = graph.weight_bytes.iter().collect();
        weights.sort_by_key(|&(_, &bytes)| std::cmp::Reverse(bytes));
        let weights = weights.into_iter().map(|(data_type, &size)| format!("{data_type} {}", bytes(size)));
        rows.push(vec![
            graph.file.clone(),
            count(graph.num_parameters),
            bytes(graph.onnx_bytes),
            bytes(graph.data_bytes),
            graph.num_nodes.to_string(),
            opsets.collect::<Vec<_>>().join(", "),
            weights.collect::<Vec<_>>().join(", "),
        ]);
    }
    align(rows, &[1, 2, 3, 4], "")
}

/// Inputs, outputs, free sizes and operators of one graph.
fn graph(graph: &GraphReport) -> String {
    let mut rows = Vec::new();
    for (title, specs) in [("inputs", &graph.inputs), ("outputs", &graph.outputs)] {
        for (index, mut row) in groups(specs).into_iter().enumerate() {
            row.insert(0, if index == 0 { title.to_owned() } else { String::new() });
            rows.push(row);
        }
    }
    let mut text = format!("{}\n{}", graph.file, align(rows, &[], INDENT));
    let range = |(name, DimRange { min, opt, max }): (&String, &DimRange)| {
        format!("{} {min} to {max}, usually {opt}", plain(name))
    };
    text += &list("sizes", graph.profile.iter().map(range), "; ");
    let mut ops: Vec<_> = graph.ops.iter().collect();
    ops.sort_by_key(|&(name, &times)| (std::cmp::Reverse(times), name));
    text + &list("ops", ops.into_iter().map(|(name, times)| format!("{name} {times}")), ", ")
}

/// `name, type, shape` of each input or output; those of all layers are one row.
fn groups(specs: &[TensorSpec]) -> Vec<Vec<String>> {
    let mut rows: Vec<(Option<LayerNames>, &TensorSpec)> = Vec::new();
    for spec in specs {
        let kind = (spec.dtype, &spec.shape);
        match (rows.last_mut(), LayerNames::of(&spec.name)) {
            (Some((Some(row), first)), Some(names))
                if row.prefix == names.prefix && (first.dtype, &first.shape) == kind =>
            {
                row.join(names);
            }
            (_, names) => rows.push((names, spec)),
        }
    }
    rows.into_iter()
        .map(|(names, spec)| {
            let name = names.map_or_else(|| spec.name.clone(), |names| names.to_text());
            vec![plain(&name), spec.dtype.name().to_owned(), plain(&spec.shape_text())]
        })
        .collect()
}

/// `past_key_values.{0..31}.key|value`
struct LayerNames {
    prefix: String,
    first: usize,
    last: usize,
    suffixes: Vec<String>,
}

impl LayerNames {
    fn of(name: &str) -> Option<Self> {
        let (rest, suffix) = name.rsplit_once('.')?;
        let (prefix, layer) = rest.rsplit_once('.')?;
        let layer = layer.parse().ok()?;
        Some(Self { prefix: prefix.to_owned(), first: layer, last: layer, suffixes: vec![suffix.to_owned()] })
    }

    fn join(&mut self, other: Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
        for suffix in other.suffixes {
            if !self.suffixes.contains(&suffix) {
                self.suffixes.push(suffix);
            }
        }
    }

    fn to_text(&self) -> String {
        let Self { prefix, first, last, suffixes } = self;
        let layers = if first == last { first.to_string() } else { format!("{{{first}..{last}}}") };
        format!("{prefix}.{layers}.{}", suffixes.join("|"))
    }
}

fn memory(cache: &CacheReport, image_tokens: usize, prompt_tokens: usize) -> String {
    let CacheReport { dtype, num_kv_heads, head_dim, num_copies, bytes_per_token, new_tokens, .. } = *cache;
    let copies = if num_copies == 1 { "updated in place" } else { "two copies" };
    let rows = [
        (
            "a token",
            bytes_per_token,
            format!("{num_kv_heads} key/value heads of {head_dim}, {}, {copies}", dtype.name()),
        ),
        (
            "a caption",
            cache.bytes_per_caption,
            format!("{image_tokens} image + {prompt_tokens} prompt + {new_tokens} new tokens"),
        ),
    ];
    let rows = rows.map(|(name, size, note)| vec![name.to_owned(), bytes(size as u64), note]);
    format!("KV cache of a caption in flight\n{}", align(rows.to_vec(), &[1], INDENT))
}

fn arithmetic(report: &FlopsReport, image_tokens: usize) -> String {
    let FlopsReport { prompt_tokens, new_tokens, flops: stages } = report;
    let share = |part: u64| match stages.total {
        0 => String::new(),
        total => format!("{:.1} %", 100.0 * part as f64 / total as f64),
    };
    let rows = [
        ("vision", stages.vision, String::new()),
        ("projector", stages.projector, String::new()),
        ("prefill", stages.prefill, format!("{image_tokens} image + {prompt_tokens} prompt tokens")),
        ("decode", stages.decode, format!("{new_tokens} new tokens, the first of them from prefill")),
        ("total", stages.total, String::new()),
    ];
    let rows = rows.map(|(name, part, note)| vec![name.to_owned(), flops(part), share(part), note]);
    format!("floating-point operations of an image\n{}", align(rows.to_vec(), &[1, 2], INDENT))
}

/// Rows as lines with columns two spaces apart; those of `right` are aligned at their right ends.
fn align(rows: Vec<Vec<String>>, right: &[usize], indent: &str) -> String {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..num_columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match right.contains(&column) {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text += &format!("{indent}{}\n", line.trim_end());
    }
    text
}

/// `title  item, item, …`, broken into lines where it gets too long; nothing without items.
fn list(title: &str, items: impl Iterator<Item = String>, separator: &str) -> String {
    /// As wide as `outputs`, so that lists continue the columns above.
    const TITLE_WIDTH: usize = 7;
    let mut lines: Vec<String> = Vec::new();
    for item in items {
        match lines.last_mut() {
            Some(line) if width(line) + separator.len() + width(&item) < MAX_WIDTH - TITLE_WIDTH => {
                *line = format!("{line}{separator}{item}");
            }
            Some(line) => {
                line.push_str(separator.trim_end());
                lines.push(item);
            }
            None => lines.push(item),
        }
    }
    let title = |index| if index == 0 { title } else { "" };
    let lines = lines.iter().enumerate();
    lines.map(|(index, line)| format!("{INDENT}{:<TITLE_WIDTH$}  {line}\n", title(index))).collect()
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// A text from a file without what would steer a terminal.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '\u{fffd}' } else { character }).collect()
}
