//! Vision: `pixel_values` to `image_features`, through the vision tower and the projector, a batch at a time.
//!
//! The features stay where the sessions put them, one row per image token, and go from here into prefill.

use std::collections::HashMap;

use recaption_export::{DataType, Precision};

use crate::error::Result;
use crate::model::Bundle;
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::provider::Device;
use crate::runtime::session::{Binding, Session, SessionOptions};

/// Vision tower and projector of one engine.
pub(crate) struct VisionEncoder {
    tower: Session,
    projector: Session,
    buffers: Buffers,
    /// Bindings of tower and projector, by batch.
    bindings: HashMap<usize, (Binding, Binding)>,
    max_batch: usize,
}

struct Buffers {
    /// `[max_batch, 3, side, side]`, on the host.
    pixel_values: Buffer,
    /// `[max_batch, num_image_tokens, feature_size]`
    vision_features: Buffer,
    /// `[max_batch * num_image_tokens, hidden]`
    image_features: Buffer,
    side: usize,
    num_image_tokens: usize,
    feature_size: usize,
    hidden_size: usize,
}

impl VisionEncoder {
    /// Loads both graphs; `decoder` is where the features are wanted.
    pub(crate) fn open(bundle: &Bundle, options: SessionOptions, decoder: Device, max_batch: usize) -> Result<Self> {
        let manifest = &bundle.manifest;
        let tower = Session::open(&bundle.graph_path(&manifest.graphs.vision_tower), options)?;
        let projector = Session::open(&bundle.graph_path(&manifest.graphs.projector), options)?;
        let (vision, hidden_size) = (&manifest.vision, manifest.decoder.hidden_size);
        let (side, num_image_tokens) = (vision.image_size, vision.num_image_tokens);
        let feature_size = vision.hidden_size * vision.feature_layers.len();
        let buffers = Buffers {
            pixel_values: Buffer::host(DataType::F32, max_batch * 3 * side * side)?,
            vision_features: tower.device_buffer(DataType::F32, max_batch * num_image_tokens * feature_size)?,
            image_features: match decoder {
                Device::Cpu => Buffer::host(DataType::F32, max_batch * num_image_tokens * hidden_size)?,
                _ => projector.device_buffer(DataType::F32, max_batch * num_image_tokens * hidden_size)?,
            },
            side,
            num_image_tokens,
            feature_size,
            hidden_size,
        };
        Ok(Self { tower, projector, buffers, bindings: HashMap::new(), max_batch })
    }

    /// Most images of one batch.
    pub(crate) fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// Encodes a batch; row `i * num_image_tokens + t` of the result is token `t` of image `i`.
    pub(crate) fn encode<'a>(&mut self, images: impl ExactSizeIterator<Item = &'a [f32]>) -> Result<TensorView> {
        let batch = images.len();
        let buffers = &mut self.buffers;
        let image_size = 3 * buffers.side * buffers.side;
        let pixels = buffers.pixel_values.as_mut_slice::<f32>();
        for (slot, image) in pixels.chunks_exact_mut(image_size).zip(images) {
            slot.copy_from_slice(image);
        }
        let (tower, projector) = match self.bindings.entry(batch) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(buffers.bind(&self.tower, &self.projector, batch)?)
            }
        };
        self.tower.run(tower)?;
        self.projector.run(projector)?;
        buffers.features(batch)
    }
}

impl Buffers {
    fn bind(&self, tower: &Session, projector: &Session, batch: usize) -> Result<(Binding, Binding)> {
        let features = || self.vision_features.view(0, &[batch, self.num_image_tokens, self.feature_size]);
        let mut tower = tower.binding()?;
        tower.bind_host_input("pixel_values", self.pixel_values.view(0, &[batch, 3, self.side, self.side])?)?;
        tower.bind_output("vision_features", features()?)?;
        let mut projector = projector.binding()?;
        projector.bind_input("vision_features", &features()?)?;
        projector.bind_output("image_features", self.features(batch)?)?;
        Ok((tower, projector))
    }

    fn features(&self, batch: usize) -> Result<TensorView> {
        self.image_features.view(0, &[batch * self.num_image_tokens, self.hidden_size])
    }
}

/// What the decoder runs on where vision runs on `device`. TensorRT does not take the decoder's fused operators, and
/// ONNX Runtime's CUDA attention has kernels for fp16 and bf16 only (contrib_ops/cuda/bert/group_query_attention.cc).
pub(crate) fn decoder_device(device: Device, precision: Precision) -> Device {
    match (device, precision) {
        (Device::Cpu | Device::Cuda(_) | Device::TensorRt(_), Precision::Fp32) => Device::Cpu,
    }
}
