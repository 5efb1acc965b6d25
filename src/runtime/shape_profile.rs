//! TensorRT's optimisation profiles: for each input with free dimensions the smallest, the usual and the largest shape. A
//! shape outside of them would make it build its engine anew, so that sizes are chosen here, before.

use std::collections::BTreeMap;
use std::fmt::Write;

use recaption_export::{Dim, DimRange, GraphFile, hex};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Shapes as the provider takes them: `input_ids:1x640,seqlens_k:1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShapeProfile {
    pub(crate) min: String,
    pub(crate) opt: String,
    pub(crate) max: String,
}

impl ShapeProfile {
    /// The profile of `graph` where its free dimensions take the sizes `dims`, or else those of the manifest.
    ///
    /// # Errors
    /// [`Error::Setting`] for a dimension that has no sizes, or impossible ones.
    pub(crate) fn new(graph: &GraphFile, dims: &BTreeMap<String, DimRange>) -> Result<Self> {
        let mut profile = Self { min: String::new(), opt: String::new(), max: String::new() };
        for input in &graph.inputs {
            if !input.shape.iter().any(|dim| matches!(dim, Dim::Named(_))) {
                continue;
            }
            let mut shapes = [String::new(), String::new(), String::new()];
            for dim in &input.shape {
                let sizes = match dim {
                    Dim::Fixed(size) => [*size; 3],
                    Dim::Named(name) => {
                        let range = dims.get(name).or_else(|| graph.profile.get(name));
                        let range = range.filter(|range| range.min <= range.opt && range.opt <= range.max);
                        let range = range.ok_or_else(|| Error::Setting {
                            reason: format!("`{}`: no range of sizes for dimension `{name}`", graph.file),
                            hint: "export the checkpoint again with --overwrite".to_owned(),
                        })?;
                        [range.min, range.opt, range.max]
                    }
                };
                for (shape, size) in shapes.iter_mut().zip(sizes) {
                    let separator = if shape.is_empty() { "" } else { "x" };
                    write!(shape, "{separator}{size}").expect("bug: strings can be written to");
                }
            }
            for (all, shape) in [&mut profile.min, &mut profile.opt, &mut profile.max].into_iter().zip(&shapes) {
                let separator = if all.is_empty() { "" } else { "," };
                write!(all, "{separator}{}:{shape}", input.name).expect("bug: strings can be written to");
            }
        }
        Ok(profile)
    }

    /// Tells engines of different shapes apart: eight hexadecimal digits.
    pub(crate) fn short_hash(&self) -> String {
        let Self { min, opt, max } = self;
        let hash = Sha256::digest(format!("{min};{opt};{max}"));
        hex(&hash[..4])
    }
}

#[cfg(test)]
mod tests {
    use recaption_export::{DataType, TensorSpec};

    use super::*;

    fn graph() -> GraphFile {
        let spec = |name: &str, shape: Vec<Dim>| TensorSpec { name: name.to_owned(), dtype: DataType::I64, shape };
        let named = |name: &str| Dim::Named(name.to_owned());
        GraphFile {
            file: "decoder.onnx".to_owned(),
            inputs: vec![
                spec("input_ids", vec![named("batch"), named("sequence")]),
                spec("total", vec![]),
                spec("past", vec![named("batch"), Dim::Fixed(8), Dim::Fixed(64)]),
            ],
            outputs: vec![],
            profile: BTreeMap::from([("sequence".to_owned(), DimRange { min: 1, opt: 5, max: 7 })]),
            num_parameters: 0,
        }
    }

    #[test]
    fn every_free_dimension_has_three_sizes() {
        let dims = BTreeMap::from([("batch".to_owned(), DimRange { min: 1, opt: 2, max: 4 })]);
        let profile = ShapeProfile::new(&graph(), &dims).unwrap();
        assert_eq!(profile.min, "input_ids:1x1,past:1x8x64");
        assert_eq!(profile.opt, "input_ids:2x5,past:2x8x64");
        assert_eq!(profile.max, "input_ids:4x7,past:4x8x64");
        let one_more = BTreeMap::from([("batch".to_owned(), DimRange { min: 1, opt: 2, max: 5 })]);
        let other = ShapeProfile::new(&graph(), &one_more).unwrap();
        assert_eq!(profile.short_hash().len(), 8);
        assert_ne!(profile.short_hash(), other.short_hash());
        assert!(ShapeProfile::new(&graph(), &BTreeMap::new()).unwrap_err().to_string().contains("`batch`"));
        let upside_down = BTreeMap::from([("batch".to_owned(), DimRange { min: 3, opt: 2, max: 4 })]);
        assert!(ShapeProfile::new(&graph(), &upside_down).is_err());
    }
}
