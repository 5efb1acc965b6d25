//! Factors that move the range of activations into weights (SmoothQuant, arXiv 2211.10438): channels with large activations
//! are divided where they are made (a norm's weight, or the rows of the layer before) and multiplied where they are used, so
//! that one scale per row serves all channels. Nothing is left to do at run time.

use std::rc::Rc;

/// Factors of every decoder layer.
#[derive(Default)]
pub(crate) struct Migration {
    layers: Vec<Factors>,
}

/// One factor per channel of each activation that a linear layer takes.
#[derive(Default)]
pub(crate) struct Factors {
    /// Into q, k and v; divides the norm's weight.
    pub(crate) attention_input: Option<Rc<[f32]>>,
    /// Out of v, one per channel of each key/value head.
    pub(crate) value_output: Option<Rc<[f32]>>,
    /// Into o: those of `value_output`, repeated for the query heads that share a key/value head.
    pub(crate) attention_output: Option<Rc<[f32]>>,
    /// Into gate and up; divides the norm's weight.
    pub(crate) mlp_input: Option<Rc<[f32]>>,
    /// Into down; divides the rows of up.
    pub(crate) mlp_hidden: Option<Rc<[f32]>>,
}

/// The factors of one layer, borrowed.
#[derive(Clone, Copy)]
pub(crate) struct LayerFactors<'a> {
    pub(crate) attention_input: &'a Option<Rc<[f32]>>,
    pub(crate) value_output: &'a Option<Rc<[f32]>>,
    pub(crate) attention_output: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_input: &'a Option<Rc<[f32]>>,
    pub(crate) mlp_hidden: &'a Option<Rc<[f32]>>,
}

impl Migration {
    pub(crate) fn layer(&self, layer: usize) -> LayerFactors<'_> {
        const NONE: &Option<Rc<[f32]>> = &None;
        match self.layers.get(layer) {
            None => LayerFactors {
                attention_input: NONE,
                value_output: NONE,
                attention_output: NONE,
                mlp_input: NONE,
                mlp_hidden: NONE,
            },
            Some(factors) => LayerFactors {
                attention_input: &factors.attention_input,
                value_output: &factors.value_output,
                attention_output: &factors.attention_output,
                mlp_input: &factors.mlp_input,
                mlp_hidden: &factors.mlp_hidden,
            },
        }
    }
}
