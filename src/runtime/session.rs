//! A graph that is loaded, and the bindings it runs with.

use std::path::Path;
use std::sync::Arc;

use ort::session::IoBinding;

use crate::error::{Error, Result};
use crate::runtime::buffer::{Buffer, Storage, TensorView};
use crate::runtime::library::load_library;
use crate::runtime::provider::Device;

/// How a session uses the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionOptions {
    pub(crate) device: Device,
    /// Threads within an operator.
    pub(crate) num_threads: usize,
    /// Whether idle threads spin before they sleep. Only one session of an engine should: the spinning pools of
    /// several sessions take the cores from one another.
    pub(crate) spin: bool,
}

/// One loaded graph. Runs need `&mut`: a session has one owner thread.
pub(crate) struct Session {
    session: ort::session::Session,
    name: String,
    device: Device,
}

impl Session {
    /// Loads the graph at `path`.
    ///
    /// # Errors
    /// [`Error::Provider`] when the device does not work, [`Error::OnnxRuntime`] when the graph does not load.
    pub(crate) fn open(path: &Path, options: SessionOptions) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let library = load_library()?;
        let doing = || format!("load `{}`", path.display());
        let configure = || -> std::result::Result<_, ort::Error> {
            let builder = ort::session::Session::builder(&library.environment)?;
            let builder = builder.with_intra_threads(options.num_threads).map_err(ort::Error::<()>::from)?;
            let builder = builder.with_intra_op_spinning(options.spin).map_err(ort::Error::<()>::from)?;
            Ok(builder)
        };
        let builder = configure().map_err(Error::ort(doing()))?;
        let mut builder = builder
            .with_execution_providers(options.device.execution_providers())
            .map_err(|error| options.device.refusal(&ort::Error::<()>::from(error)))?;
        let session = builder.commit_from_file(path).map_err(Error::ort(doing()))?;
        Ok(Self { session, name, device: options.device })
    }

    /// An empty binding; bind every input and the outputs wanted.
    pub(crate) fn binding(&self) -> Result<Binding> {
        let binding = self.session.create_binding().map_err(Error::ort(format!("bind `{}`", self.name)))?;
        Ok(Binding { binding, owners: Vec::new(), host_inputs: Vec::new(), graph: self.name.clone() })
    }

    /// A zeroed buffer in the memory of this session's device.
    pub(crate) fn device_buffer(&self, data_type: recaption_export::DataType, num_elements: usize) -> Result<Buffer> {
        Buffer::new(&self.device.allocator(&self.session)?, data_type, num_elements)
    }

    /// Runs the graph on what `binding` binds.
    pub(crate) fn run(&mut self, binding: &mut Binding) -> Result<()> {
        // ONNX Runtime copies an input that lives on another device when it is bound, not when it runs.
        if self.device != Device::Cpu {
            binding.rebind_host_inputs()?;
        }
        self.session.run_binding(&binding.binding).map_err(Error::ort(format!("run `{}`", self.name)))?;
        Ok(())
    }
}

/// Inputs and outputs of a graph tied to buffers, once for many runs.
pub(crate) struct Binding {
    binding: IoBinding,
    /// Keeps the memory alive that the bound tensors point into.
    owners: Vec<Arc<Storage>>,
    /// Inputs that the host writes between runs.
    host_inputs: Vec<(String, TensorView)>,
    graph: String,
}

impl Binding {
    /// Binds an input that the host may write anew before each run.
    pub(crate) fn bind_host_input(&mut self, name: &str, tensor: TensorView) -> Result<()> {
        self.bind_input(name, &tensor)?;
        self.host_inputs.push((name.to_owned(), tensor));
        Ok(())
    }

    fn rebind_host_inputs(&mut self) -> Result<()> {
        for (name, tensor) in &self.host_inputs {
            let doing = format!("bind input `{name}` of `{}`", self.graph);
            self.binding.bind_input(name, tensor.value()).map_err(Error::ort(doing))?;
        }
        Ok(())
    }

    pub(crate) fn bind_input(&mut self, name: &str, tensor: &TensorView) -> Result<()> {
        self.owners.push(tensor.owner());
        self.binding
            .bind_input(name, tensor.value())
            .map_err(Error::ort(format!("bind input `{name}` of `{}`", self.graph)))
    }

    pub(crate) fn bind_output(&mut self, name: &str, tensor: TensorView) -> Result<()> {
        self.owners.push(tensor.owner());
        self.binding
            .bind_output(name, tensor.into_value())
            .map_err(Error::ort(format!("bind output `{name}` of `{}`", self.graph)))
    }
}
