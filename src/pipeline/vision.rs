//! Vision: `pixel_values` to `image_features`, through the vision tower and the projector, a batch at a time.
//!
//! The features stay where the sessions put them, one row per image token, and go from here into prefill.

use std::collections::HashMap;

use recaption_export::{DataType, GraphFile, Manifest, Precision, Target};

use crate::error::{Error, Result};
use crate::model::Bundle;
use crate::pipeline::preprocess::{PixelFormat, PixelValues};
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
    /// `[max_batch, …]`, on the host.
    pixel_values: Buffer,
    /// `[max_batch, num_image_tokens, feature_size]`
    vision_features: Buffer,
    /// `[max_batch * num_image_tokens, hidden]`
    image_features: Buffer,
    pixel_format: PixelFormat,
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
        let num_image_tokens = vision.num_image_tokens;
        let pixel_format = PixelFormat::of(manifest);
        let vision_type = dtype_of(&manifest.graphs.vision_tower, "vision_features")?;
        let feature_size = vision.hidden_size * vision.feature_layers.len();
        let buffers = Buffers {
            pixel_values: Buffer::host(manifest.header.pixel_values.dtype, max_batch * pixel_format.num_values())?,
            vision_features: tower.device_buffer(vision_type, max_batch * num_image_tokens * feature_size)?,
            image_features: match decoder {
                Device::Cpu => Buffer::host(manifest.header.activations, max_batch * num_image_tokens * hidden_size)?,
                _ => {
                    projector.device_buffer(manifest.header.activations, max_batch * num_image_tokens * hidden_size)?
                }
            },
            pixel_format,
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
    pub(crate) fn encode<'a>(&mut self, images: impl ExactSizeIterator<Item = &'a PixelValues>) -> Result<TensorView> {
        let batch = images.len();
        let buffers = &mut self.buffers;
        for (i, image) in images.enumerate() {
            image.copy_to(&mut buffers.pixel_values, i);
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
        tower.bind_host_input("pixel_values", self.pixel_values.view(0, &self.pixel_format.shape(batch))?)?;
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

/// Type of a graph's output.
fn dtype_of(graph: &GraphFile, output: &str) -> Result<DataType> {
    let spec = graph.outputs.iter().find(|spec| spec.name == output);
    spec.map(|spec| spec.dtype).ok_or_else(|| Error::Setting {
        reason: format!("`{}` has no output `{output}`", graph.file),
        hint: "export the checkpoint again with --overwrite".to_owned(),
    })
}

/// What the decoder runs on where vision runs on `device`. TensorRT does not take ONNX Runtime's fused operators, and the
/// attention among them has CUDA kernels for fp16 and bf16 only (contrib_ops/cuda/bert/group_query_attention.cc).
pub(crate) fn decoder_device(device: Device, manifest: &Manifest) -> Device {
    match (device, manifest.header.target, manifest.header.activations) {
        (Device::Cpu, ..) => Device::Cpu,
        (device, Target::TensorRt, _) => device,
        (_, Target::Ort, DataType::F32) => Device::Cpu,
        (Device::Cuda(index) | Device::TensorRt(index), Target::Ort, _) => Device::Cuda(index),
    }
}

/// # Errors
/// [`Error::Setting`] when `device` has no kernels for the bundle's precision.
pub(crate) fn check_device(device: Device, manifest: &Manifest) -> Result<()> {
    let precisions = [manifest.header.precision, manifest.header.vision_precision];
    let is_cpu = device == Device::Cpu;
    let refused = precisions.into_iter().find_map(|precision| match (precision, is_cpu) {
        (Precision::Bf16, true) => Some((precision, "use --provider cuda, or export with --precision fp32 or int8")),
        (Precision::Int8, false) => Some((precision, "use --provider cpu, or export with --precision fp16 or int4")),
        _ => None,
    });
    match refused {
        None => Ok(()),
        Some((precision, hint)) => Err(Error::Setting {
            reason: format!("provider {} does not run {} bundles", device.name(), precision.name()),
            hint: hint.to_owned(),
        }),
    }
}
