//! Vision: `pixel_values` to `image_features`, through the vision tower and the projector, a batch at a time.
//!
//! The features stay where the sessions put them, one row per image token, and go from here into prefill.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use recaption_export::{DataType, DimRange, GraphFile, Manifest, Precision, Target};

use crate::error::{Error, Result};
use crate::model::Bundle;
use crate::model::batch_steps::BatchSteps;
use crate::pipeline::preprocess::{PixelFormat, PixelValues};
use crate::profile::recorder::{self, Work};
use crate::runtime::block::Block;
use crate::runtime::buffer::{Buffer, TensorView};
use crate::runtime::provider::Device;
use crate::runtime::session::{Binding, Session, SessionOptions};
use crate::runtime::stream::DeviceTimer;
use crate::stage::Stage;

/// Vision tower and projector of one engine.
pub(crate) struct VisionEncoder {
    tower: Session,
    projector: Session,
    buffers: Buffers,
    /// Bindings of tower and projector, by batch.
    bindings: HashMap<usize, (Binding, Binding)>,
    batch_steps: BatchSteps,
    max_batch: usize,
    timer: Option<DeviceTimer>,
}

struct Buffers {
    /// `[max_batch, …]`
    pixel_values: Block,
    /// `[max_batch, num_image_tokens, feature_size]`
    vision_features: Buffer,
    /// `[max_batch * num_image_tokens, hidden]`
    image_features: Buffer,
    /// The same on the host, where the decoder runs there and vision does not.
    host_features: Option<Buffer>,
    pixel_format: PixelFormat,
    num_image_tokens: usize,
    feature_size: usize,
    hidden_size: usize,
}

/// How a vision encoder is set up.
pub(crate) struct VisionOptions {
    pub(crate) session: SessionOptions,
    /// Where the features are wanted.
    pub(crate) decoder: Device,
    pub(crate) max_batch: usize,
    /// Batches are padded to a few sizes.
    pub(crate) has_fixed_shapes: bool,
    pub(crate) times_device: bool,
}

impl VisionEncoder {
    /// Loads both graphs.
    pub(crate) fn open(bundle: &Bundle, options: VisionOptions) -> Result<Self> {
        let VisionOptions { session, decoder, max_batch, has_fixed_shapes, times_device } = options;
        let manifest = &bundle.manifest;
        let num_image_tokens = manifest.vision.num_image_tokens;
        let sizes = |max| DimRange { min: max / max_batch, opt: max, max };
        let dims = [("batch", sizes(max_batch)), ("rows", sizes(max_batch * num_image_tokens))];
        let dims = dims.map(|(name, sizes)| (name.to_owned(), sizes)).into();
        let session = SessionOptions { dims, captures_graphs: false, ..session };
        let open = |graph: &GraphFile| Session::open(&bundle.graph_path(graph), graph, &session);
        let (tower, projector) = (open(&manifest.graphs.vision_tower)?, open(&manifest.graphs.projector)?);
        let (vision, hidden_size) = (&manifest.vision, manifest.decoder.hidden_size);
        let pixel_format = PixelFormat::of(manifest);
        let vision_type = dtype_of(&manifest.graphs.vision_tower, "vision_features")?;
        let feature_size = vision.hidden_size * vision.feature_layers.len();
        let num_features = max_batch * num_image_tokens * hidden_size;
        let is_apart = decoder == Device::Cpu && session.device != Device::Cpu;
        let buffers = Buffers {
            pixel_values: Block::new(
                &tower,
                &[(manifest.header.pixel_values.dtype, max_batch * pixel_format.num_values())],
            )?,
            vision_features: tower.device_buffer(vision_type, max_batch * num_image_tokens * feature_size)?,
            image_features: projector.device_buffer(manifest.header.activations, num_features)?,
            host_features: is_apart
                .then(|| projector.staging_buffer(manifest.header.activations, num_features))
                .transpose()?,
            pixel_format,
            num_image_tokens,
            feature_size,
            hidden_size,
        };
        let batch_steps = if has_fixed_shapes { BatchSteps::doubling(max_batch) } else { BatchSteps::exact(max_batch) };
        let timer = if times_device { tower.stream().timer()? } else { None };
        Ok(Self { tower, projector, buffers, bindings: HashMap::new(), batch_steps, max_batch, timer })
    }

    /// Records what the device took for the last batch, where it keeps the time. The host must have waited for it.
    pub(crate) fn record_device_time(&mut self) -> Result<()> {
        recorder::add_device_time(Stage::Vision, &mut self.timer)
    }

    /// Most images of one batch.
    pub(crate) fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// Encodes a batch; row `i * num_image_tokens + t` of the result is token `t` of image `i`. On a GPU the result is not
    /// there yet, but will be when the next run of the same stream begins.
    pub(crate) fn encode<'a>(&mut self, images: impl ExactSizeIterator<Item = &'a PixelValues>) -> Result<TensorView> {
        let begun = recorder::begin();
        let num_images = images.len();
        let buffers = &mut self.buffers;
        for (i, image) in images.enumerate() {
            image.copy_to(&mut buffers.pixel_values, i);
        }
        // Behind the images of this batch lie those of earlier ones, or zeros: their features are not read.
        let batch = self.batch_steps.at_least(num_images);
        let (tower, projector) = match self.bindings.entry(batch) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(buffers.bind(&self.tower, &self.projector, batch)?),
        };
        self.timer.as_mut().map(DeviceTimer::begin).transpose()?;
        buffers.pixel_values.send_first(&self.tower, num_images * buffers.pixel_format.num_values())?;
        self.tower.run(tower)?;
        self.projector.run(projector)?;
        self.timer.as_mut().map(DeviceTimer::end).transpose()?;
        let num_tokens = num_images * buffers.num_image_tokens;
        let shape = [num_tokens, buffers.hidden_size];
        let features = match &mut buffers.host_features {
            None => buffers.image_features.view(0, &shape)?,
            Some(host_features) => {
                let num_bytes = host_features.num_bytes() / self.max_batch * num_images;
                self.projector.stream().download(&buffers.image_features, host_features, num_bytes)?;
                self.projector.stream().synchronize()?;
                host_features.view(0, &shape)?
            }
        };
        let work = Work {
            num_images: num_images as u32,
            num_tokens: num_tokens as u32,
            padded_batch: batch as u32,
            context_tokens: 0,
        };
        begun.end(Stage::Vision, work);
        Ok(features)
    }
}

impl Buffers {
    fn bind(&self, tower: &Session, projector: &Session, batch: usize) -> Result<(Binding, Binding)> {
        let features = || self.vision_features.view(0, &[batch, self.num_image_tokens, self.feature_size]);
        let mut tower = tower.binding()?;
        tower.bind_input("pixel_values", &self.pixel_values.view(0, &self.pixel_format.shape(batch))?)?;
        tower.bind_output("vision_features", features()?)?;
        let mut projector = projector.binding()?;
        projector.bind_input("vision_features", &features()?)?;
        let shape = [batch * self.num_image_tokens, self.hidden_size];
        projector.bind_output("image_features", self.image_features.view(0, &shape)?)?;
        Ok((tower, projector))
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
        (Device::Cpu, ..) | (_, Target::Cpu, _) => Device::Cpu,
        (device, Target::TensorRt, _) => device,
        (_, Target::Ort, DataType::F32) => Device::Cpu,
        (Device::Cuda(index) | Device::TensorRt(index), Target::Ort, _) => Device::Cuda(index),
    }
}

/// # Errors
/// [`Error::Setting`] when `device` has no kernels for the bundle's precision.
pub(crate) fn check_device(device: Device, manifest: &Manifest) -> Result<()> {
    let precisions = [manifest.header.precision, manifest.header.vision_precision];
    let refused = precisions.into_iter().find_map(|precision| match (precision, device) {
        (Precision::Bf16, Device::Cpu) => {
            Some((precision, "use --provider cuda, or export with --precision fp32, or int8 and --target cpu"))
        }
        (Precision::Int8, Device::Cuda(_) | Device::TensorRt(_)) => {
            Some((precision, "use --provider cpu, or export with --precision fp16 or int4"))
        }
        // It has the conversions, but multiplies in fp16, with the weights made anew in each run.
        (Precision::Fp8, Device::Cuda(_)) => {
            Some((precision, "use --provider tensorrt, or export with --precision fp16"))
        }
        _ => None,
    });
    let vision = manifest.header.vision_precision;
    match refused {
        // Its parser knows no blocks of integers; the decoder, if it has them, is CUDA's.
        None if matches!(device, Device::TensorRt(_)) && matches!(vision, Precision::Int8Block | Precision::Int4) => {
            Err(Error::Setting {
                reason: format!("provider {} does not run {} vision towers", device.name(), vision.name()),
                hint: "use --provider cuda, or export with --vision-precision fp16".to_owned(),
            })
        }
        None => Ok(()),
        Some((precision, hint)) => Err(Error::Setting {
            reason: format!("provider {} does not run {} bundles", device.name(), precision.name()),
            hint: hint.to_owned(),
        }),
    }
}
