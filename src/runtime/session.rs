//! A graph that is loaded, and the bindings it runs with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use ort::operator::OperatorDomain;
use ort::session::{IoBinding, RunOptions};
use recaption_export::{DataType, DimRange};
use recaption_kernels::Level;

use crate::console::print_line;
use crate::error::{Error, Result};
use crate::runtime::buffer::{Buffer, Storage, TensorView};
use crate::runtime::library::load_library;
use crate::runtime::provider::{Device, ProviderSettings};
use crate::runtime::shape_profile::ShapeProfile;
use crate::runtime::stream::Stream;

/// How a session uses the machine.
#[derive(Clone)]
pub(crate) struct SessionOptions {
    pub(crate) device: Device,
    /// Where its work is queued; of the same device.
    pub(crate) stream: Arc<Stream>,
    /// Threads within an operator.
    pub(crate) num_threads: usize,
    /// Whether idle threads spin before they sleep. Only one session of an engine should: the spinning pools of
    /// several sessions take the cores from one another.
    pub(crate) spin: bool,
    /// Most bytes that the session's arena takes of a GPU's memory.
    pub(crate) memory_limit: Option<usize>,
    /// Whether runs may be captured as CUDA graphs: see [`Session::run_captured`].
    pub(crate) captures_graphs: bool,
    /// Folder for the engines that TensorRT builds.
    pub(crate) engine_cache: Option<PathBuf>,
    /// Whether building an engine says so on standard error.
    pub(crate) shows_builds: bool,
    /// Sizes that the free dimensions take; TensorRT builds its engines for them.
    pub(crate) dims: BTreeMap<String, DimRange>,
    /// Where ONNX Runtime writes how long each operator took, when the session is dropped: the beginning of the file's path, to
    /// which it adds the graph's name and the time.
    pub(crate) profile: Option<PathBuf>,
}

impl SessionOptions {
    /// A session that has the device to itself, with a stream of its own.
    ///
    /// # Errors
    /// [`Error::Cuda`] when there is no such GPU.
    pub(crate) fn new(device: Device, num_threads: usize) -> Result<Self> {
        Ok(Self {
            device,
            stream: Stream::open(device)?,
            num_threads,
            spin: true,
            memory_limit: None,
            captures_graphs: false,
            engine_cache: None,
            shows_builds: false,
            dims: BTreeMap::new(),
            profile: None,
        })
    }
}

/// One loaded graph. Runs need `&mut`: a session has one owner thread.
pub(crate) struct Session {
    session: ort::session::Session,
    name: String,
    device: Device,
    run_options: RunOptions,
    captures_graphs: bool,
    /// After the session, which puts its work into it.
    stream: Arc<Stream>,
}

/// Time between two lines about an engine that is being built; one from the cache is loaded in less.
const BUILD_INTERVAL: Duration = Duration::from_secs(15);

fn print_build(name: &str, elapsed: Duration) {
    let seconds = elapsed.as_secs();
    print_line(&format!("building TensorRT's engine of `{name}` for {seconds} s; later runs on this GPU will find it"));
}

/// Does `body`, and calls `report` with the time it has taken, every `interval`.
fn reporting<T>(interval: Duration, report: impl Fn(Duration) + Sync, body: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let (over, is_over) = crossbeam::channel::bounded::<()>(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Ends when `over` is dropped, as the body has returned or panicked.
            while is_over.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                report(started.elapsed());
            }
        });
        let result = body();
        drop(over);
        result
    })
}

/// Option of a run that names the CUDA graph it is captured as, or replayed from.
const GRAPH_ID: &str = "gpu_graph_id";
/// The graph id of a run that is never captured.
const NO_GRAPH: &str = "-1";

impl Session {
    /// Loads the graph at `path`; `graph` is what the manifest says about it.
    ///
    /// # Errors
    /// [`Error::Provider`] when the device does not work, [`Error::OnnxRuntime`] when the graph does not load,
    /// [`Error::Setting`] when a dimension's sizes lie outside of what the graph was made for.
    pub(crate) fn open(path: &Path, graph: &recaption_export::GraphFile, options: &SessionOptions) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let library = load_library()?;
        let doing = || format!("load `{}`", path.display());
        let is_tensorrt = matches!(options.device, Device::TensorRt(_));
        let settings = ProviderSettings {
            stream: options.stream.handle(),
            memory_limit: options.memory_limit,
            captures_graphs: options.captures_graphs,
            engine_cache: options.engine_cache.as_deref(),
            engine_name: &name,
            shapes: is_tensorrt.then(|| ShapeProfile::new(graph, &options.dims)).transpose()?,
        };
        let operators = own_operators(options.num_threads)?;
        let profile = options.profile.as_ref().map(|path| {
            let mut path = path.clone().into_os_string();
            path.push(&name);
            PathBuf::from(path)
        });
        let configure = move || -> std::result::Result<_, ort::Error> {
            let builder = ort::session::Session::builder(&library.environment)?;
            let builder = builder.with_intra_threads(options.num_threads).map_err(ort::Error::<()>::from)?;
            let builder = builder.with_intra_op_spinning(options.spin).map_err(ort::Error::<()>::from)?;
            // Weights beside the arena, which would round them up.
            let key = "session.use_device_allocator_for_initializers";
            let builder = builder.with_config_entry(key, "1").map_err(ort::Error::<()>::from)?;
            let builder = builder.with_operators(operators).map_err(ort::Error::<()>::from)?;
            // It moves fp8's QuantizeLinear in front of a Transpose, which takes no fp8 before opset 21: the graph would not load. (The
            // option that turns off all of its kind would have the weights made into fp16 at the start.)
            let key = "optimization.disable_specified_optimizers";
            let builder =
                builder.with_config_entry(key, "QDQPropagationTransformer").map_err(ort::Error::<()>::from)?;
            match &profile {
                Some(path) => builder.with_profiling(path).map_err(ort::Error::<()>::from),
                None => Ok(builder),
            }
        };
        let builder = configure().map_err(Error::ort(doing()))?;
        let mut builder = builder
            .with_execution_providers(options.device.execution_providers(&settings))
            .map_err(|error| options.device.refusal(&ort::Error::<()>::from(error)))?;
        // ONNX Runtime enters the operators of a session into a list of the process, without a lock: one session at a time.
        static LOADING: Mutex<()> = Mutex::new(());
        let _alone = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut build = || builder.commit_from_file(path).map_err(Error::ort(doing()));
        let session = match is_tensorrt && options.shows_builds {
            true => reporting(BUILD_INTERVAL, |elapsed| print_build(&name, elapsed), build)?,
            false => build()?,
        };
        let run_options = run_options(options.device, NO_GRAPH).map_err(Error::ort(doing()))?;
        Ok(Self {
            session,
            name,
            device: options.device,
            run_options,
            captures_graphs: options.captures_graphs,
            stream: Arc::clone(&options.stream),
        })
    }

    /// An empty binding; bind every input and the outputs wanted.
    pub(crate) fn binding(&self) -> Result<Binding> {
        let binding = self.session.create_binding().map_err(Error::ort(format!("bind `{}`", self.name)))?;
        Ok(Binding { binding, owners: Vec::new(), graph: self.name.clone(), captured_as: None })
    }

    /// The stream that runs are queued in.
    pub(crate) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Whether [`Self::run_captured`] captures.
    pub(crate) fn captures_graphs(&self) -> bool {
        self.captures_graphs
    }

    /// A zeroed buffer in the memory of this session's device.
    pub(crate) fn device_buffer(&self, data_type: DataType, num_elements: usize) -> Result<Buffer> {
        if self.device == Device::Cpu {
            return Buffer::host(data_type, num_elements);
        }
        let allocator = self.device.allocator(&self.session)?;
        let mut buffer = Buffer::new(&allocator, false, data_type, num_elements)?;
        self.stream.zero(&mut buffer)?;
        Ok(buffer)
    }

    /// A zeroed buffer on the host, from which copies to this session's device are fastest.
    pub(crate) fn staging_buffer(&self, data_type: DataType, num_elements: usize) -> Result<Buffer> {
        let allocator = self.device.staging_allocator(&self.session)?;
        let mut buffer = Buffer::new(&allocator, true, data_type, num_elements)?;
        buffer.zero_host();
        Ok(buffer)
    }

    /// Runs the graph on what `binding` binds. On a GPU the run is queued: wait for the stream before the host reads.
    pub(crate) fn run(&mut self, binding: &Binding) -> Result<()> {
        run(&mut self.session, &self.name, binding, &self.run_options)
    }

    /// As [`Self::run`], but where the session captures graphs the first run of this binding is captured and the later ones
    /// are replayed: its buffers must stay where they are. `id` is the binding's own.
    pub(crate) fn run_captured(&mut self, binding: &mut Binding, id: usize) -> Result<()> {
        if binding.captured_as.is_none() {
            let graph_id = if self.captures_graphs { id.to_string() } else { NO_GRAPH.to_owned() };
            let doing = Error::ort(format!("run `{}`", self.name));
            binding.captured_as = Some(run_options(self.device, &graph_id).map_err(doing)?);
        }
        let options = binding.captured_as.as_ref().expect("bug: set above");
        run(&mut self.session, &self.name, binding, options)
    }
}

/// The operators of target cpu.
fn own_operators(num_threads: usize) -> Result<OperatorDomain> {
    let level = Level::current().map_err(|error| Error::Setting {
        reason: error.to_string(),
        hint: "leave RECAPTION_CPU unset: the best instruction set of this processor is taken".to_owned(),
    })?;
    recaption_operators::domain(level, num_threads).map_err(Error::ort("register the CPU operators"))
}

fn run_options(device: Device, graph_id: &str) -> std::result::Result<RunOptions, ort::Error> {
    let mut options = RunOptions::new()?;
    if device != Device::Cpu {
        options.set(GRAPH_ID, graph_id)?;
        // Copies and runs are in one stream, in order: one wait at the end does.
        options.disable_device_sync()?;
    }
    Ok(options)
}

fn run(session: &mut ort::session::Session, name: &str, binding: &Binding, options: &RunOptions) -> Result<()> {
    let outputs = session.run_binding_with_options(&binding.binding, options);
    outputs.map(drop).map_err(Error::ort(format!("run `{name}`")))
}

/// Inputs and outputs of a graph tied to buffers, once for many runs.
pub(crate) struct Binding {
    binding: IoBinding,
    /// Keeps the memory alive that the bound tensors point into.
    owners: Vec<Arc<Storage>>,
    graph: String,
    /// Options of [`Session::run_captured`].
    captured_as: Option<RunOptions>,
}

impl Binding {
    /// Binds memory of the graph's device, or of the host where the graph reads that input there.
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn a_long_build_is_reported_until_it_ends_and_a_short_one_not() {
        let count = AtomicUsize::new(0);
        let report = |_| {
            count.fetch_add(1, Ordering::SeqCst);
        };
        let wait_for_two = || while count.load(Ordering::SeqCst) < 2 {};
        reporting(Duration::from_millis(1), report, wait_for_two);
        let after = count.load(Ordering::SeqCst);
        assert_eq!(reporting(Duration::from_secs(3600), report, || 7), 7);
        assert_eq!(count.load(Ordering::SeqCst), after);
    }
}
