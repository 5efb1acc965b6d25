//! The command line: what the user types, and the help that teaches it.

mod limits;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use recaption_export::{Precision, Target};

use crate::live;
use crate::model::TemplateChoice;
use crate::model::prompt::{DEFAULT_PROMPT, DEFAULT_PROMPT_TOKENS};
use crate::pipeline::engine::Injection;
use crate::pipeline::source::Part;
use crate::pipeline::write::Format;
use crate::pipeline::write::failures::MaxFailures;
use crate::pipeline::write::fault::Fault;
use crate::runtime::ProviderChoice;
use crate::stage::Stage;

pub use limits::LimitArgs;

/// Exports vision-language captioners to ONNX and re-captions web images by the billion.
#[derive(Debug, Parser)]
#[command(name = "recaption", version, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 all images captioned; 1 finished, some images failed; 2 usage or set-up; 130 interrupted."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What is told on the way.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Log events on standard error, for every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// Log events from this level on: error, warn, info, debug, trace or off [default: warn]
    ///
    /// info tells of each shard, engine and failed image. Directives as of Rust's `tracing` work too: recaption=debug,ort=warn.
    /// Example: --log-level info
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "RECAPTION_LOG",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub log_level: Option<String>,
    /// Form of all that goes to standard error: text, or json for one object a line
    ///
    /// With json, progress, warnings and errors are such objects too, and there is no progress bar. Example: --log-format json
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text, hide_short_help = true)]
    pub log_format: LogFormat,
}

/// Forms of standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// JSON objects, one a line
    Json,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Turn a LLaVA or CLIP checkpoint into a bundle of ONNX graphs
    ///
    /// The graphs (vision tower, projector, decoder with KV cache) are written straight from the weights: no Python, no
    /// tracing, and memory that does not grow with the model. The checkpoint is a folder in transformers' layout or in that of
    /// the LLaVA repository: config.json, *.safetensors or pytorch_model*.bin, tokenizer.json.
    ///
    /// A CLIP becomes two graphs, an image tower and a text tower: from a folder in transformers' layout, or from one file of
    /// weights under OpenAI's names, such as Long-CLIP's.
    #[command(after_long_help = "Examples:\n  recaption export llava-llama-3-8b --out bundles/llava-8b\n  \
        recaption export vicuna-7b --lora llava-lora --vision-tower clip-vit-l-336 --out bundles/llava-7b\n  \
        recaption export longclip-L.pt --tokenizer clip-vit-large-patch14 --out bundles/longclip")]
    Export(ExportArgs),
    /// Caption images with a bundle
    ///
    /// INPUT is an image, a folder (searched recursively), a webdataset tar (`{key}.jpg` with optional `{key}.txt` and
    /// `{key}.json`; gzip-compressed or not), a .parquet file with a column of images, a brace range of those, or `-` for
    /// paths and URLs of images on standard input, one a line. All of them may lie in an object store or on a web server:
    /// s3://, gs://, az://, https://, with the settings of the stores' own tools (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).
    ///
    /// With --out, each input shard becomes one file in the output folder, and the same command again goes on after the
    /// shards that are done. Without it, one JSON object per image goes to standard output. An image that fails is a row with
    /// `status: failed` and its reason; it never ends the run.
    #[command(after_long_help = "Examples:\n  recaption run photos/ --model bundles/llava-8b\n  \
        recaption run 'shards/{00000..00012}.tar' --model bundles/llava-8b --out captions\n  \
        recaption run 's3://bucket/train-{00000..00012}.parquet' --model bundles/llava-8b --out captions\n  \
        find . -name '*.png' | recaption run - --model bundles/llava-8b --out captions --provider cuda")]
    Run(Box<RunArgs>),
    /// Say where the time of a run goes, and how far that is from what the machine can do
    ///
    /// Captions INPUT as `run` does, with the same flags, and throws the captions away. Prints a table of the stages: how many
    /// batches, how long they and their queues take, which stage limits the run; time to first token and per token; how much of
    /// the machine's peaks for matrix products and for reading memory was used, which are measured at the end. Writes to
    /// --out: profile.json (all numbers, for `recaption plan`), trace.json (open it at ui.perfetto.dev) and report.html
    /// (one page with pictures, which loads nothing).
    #[command(after_long_help = "Examples:\n  recaption profile photos/ --model bundles/llava-8b --out profile\n  \
        recaption profile 'shards/{00000..00001}.tar' --model bundles/llava-8b --out profile --limit 2000\n  \
        recaption profile photos/ --model bundles/llava-8b --out profile --ort-profile --limit 64")]
    Profile(ProfileArgs),
    /// Say what this machine can caption with, and what is missing
    ///
    /// Looks for the ONNX Runtime library and its providers, NVIDIA's driver and libraries, GPUs, the processor's
    /// instruction sets, memory and limits, and multiplies two matrices through each provider that works. Exit code 0: images
    /// can be captioned here, if only on the CPU; 2: they cannot.
    #[command(
        after_help = "Examples:\n  recaption doctor\n  recaption doctor --model bundles/llava-8b\n  recaption doctor --json | jq .providers"
    )]
    Doctor(DoctorArgs),
    /// Say what is in a bundle, and whether it is whole
    ///
    /// Its graphs with their inputs, operators and weights, the memory of a caption in flight, and the arithmetic of an image.
    /// Every operator is checked against the bundle's target, and every graph against the manifest: what does not fit is an
    /// error (exit code 2).
    #[command(after_long_help = "Examples:\n  recaption inspect bundles/llava-8b\n  \
        recaption inspect bundles/llava-8b --verify\n  \
        recaption inspect bundles/llava-8b --json | jq .flops_per_image.total")]
    Inspect(InspectArgs),
    /// Say how long captioning would take, on how many devices, and what it would cost
    ///
    /// From the arithmetic and the bytes that an image needs, over what the device can do at most, times the share of it that
    /// practice reaches: assumed as a range, or measured on this or another machine by `recaption profile` (--from). Nothing is
    /// run and no weights are needed: a checkpoint's config.json will do. docs/planning.md has the method and how far it is off.
    #[command(after_long_help = "Examples:\n  \
        recaption plan --model llava-llama-3-8b --device-kind h100-sxm --images 1.3e9 --devices 512 --price-per-hour 2.5\n  \
        recaption plan --model bundles/llava-8b-fp8 --device-kind l40s --cores 8\n  \
        recaption plan --from profiles/today/profile.json --images 1e6 --new-tokens 80")]
    Plan(PlanArgs),
}

/// `recaption export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// Folder of the checkpoint, or a CLIP's file of weights
    pub checkpoint: PathBuf,
    /// Folder to write the bundle to; it must not exist, unless --overwrite
    ///
    /// Example: --out bundles/llava-8b
    #[arg(long, value_name = "BUNDLE_DIR")]
    pub out: PathBuf,
    /// Precision of the weights of decoder and vision tower
    ///
    /// On a CPU int8 with --target cpu is the fastest and fp32 the most exact; on a GPU fp16. int8-block and int4 are small: 1 and a bit more
    /// than half a byte per weight. With --target tensorrt: fp32, fp16, bf16 or fp8. Example: --precision int8
    #[arg(long, value_enum, default_value_t = PrecisionArg::Fp32)]
    pub precision: PrecisionArg,
    /// Precision of vision tower and projector, where it is to differ from --precision [default: the same; int8-block for int4, fp16 for fp8]
    ///
    /// Example: --precision int4 --vision-precision int8
    #[arg(long, value_enum, value_name = "PRECISION")]
    pub vision_precision: Option<PrecisionArg>,
    /// Type of the numbers between the weights of int8-block and int4, and of their KV cache [default: fp32]
    ///
    /// fp32 is for CPUs; CUDA has attention in fp16 only. Example: --precision int4 --activations fp16
    #[arg(long, value_enum, value_name = "PRECISION")]
    pub activations: Option<ActivationsArg>,
    /// How 4-bit weights are rounded [default: search]
    ///
    /// Example: --precision int4 --rounding nearest
    #[arg(long, value_enum)]
    pub rounding: Option<RoundingArg>,
    /// What fp8, int8, int8-block and int4 learn the range of activations from: `captions` (built in), `random` ids, `none`, or a text file [default: captions]
    ///
    /// The decoder is run over the first 512 tokens, one layer at a time, and channels with a wide range are evened out in the
    /// weights (SmoothQuant). int4 learns nothing from random ids. fp8 takes the largest values as the end of its range, and
    /// cannot do without. Example: --precision int8 --calibration my-captions.txt
    #[arg(long, value_name = "captions|random|none|FILE")]
    pub calibration: Option<String>,
    /// Keep int8 weights small enough for x86 processors without VNNI
    ///
    /// Their 16-bit sums of 8-bit products would overflow: ONNX Runtime's operators need it there, those of --target cpu are
    /// a quarter faster with it. Costs a little quality. Example: --precision int8 --reduce-range
    #[arg(long)]
    pub reduce_range: bool,
    /// Operators to build the graphs from
    ///
    /// Example: --target tensorrt --precision fp16
    #[arg(long, value_enum, default_value_t = TargetArg::Ort)]
    pub target: TargetArg,
    /// Folder of the CLIP vision tower, for a checkpoint without
    ///
    /// LLaVA's own layout may leave the tower out; config.json then names it (mm_vision_tower). The folder is one of
    /// transformers: config.json, model.safetensors or pytorch_model.bin, preprocessor_config.json. For a checkpoint that
    /// embeds its tower in that layout, only the settings are read, not the weights. Example: --vision-tower
    /// clip-vit-large-patch14-336
    #[arg(long, value_name = "DIR")]
    pub vision_tower: Option<PathBuf>,
    /// Folder of a LoRA adapter to merge into the weights
    ///
    /// As peft saves it: adapter_config.json with adapter_model.safetensors or adapter_model.bin, and LLaVA's
    /// non_lora_trainables.bin and config.json where they are. Example: --lora llava-v1.5-7b-lora
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// tokenizer.json, or a folder that has one, for a checkpoint without
    ///
    /// Example: --tokenizer Meta-Llama-3-8B-Instruct
    #[arg(long, value_name = "FILE_OR_DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Replace the bundle that stands at --out
    ///
    /// Only a folder with a manifest.json is replaced. Example: --overwrite
    #[arg(long)]
    pub overwrite: bool,
}

/// Precisions that export writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// 32-bit floats
    Fp32,
    /// 16-bit floats; slow on a CPU
    Fp16,
    /// 16-bit floats of wide range, for GPUs
    Bf16,
    /// 8-bit floats in the decoder, for TensorRT on GPUs from Ada and Hopper on
    Fp8,
    /// 8-bit integers with a scale per row of activations, for CPUs
    Int8,
    /// 8-bit weights in blocks of 128
    Int8Block,
    /// 4-bit weights in blocks of 32
    Int4,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Fp32 => Self::Fp32,
            PrecisionArg::Fp16 => Self::Fp16,
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::Fp8 => Self::Fp8,
            PrecisionArg::Int8 => Self::Int8,
            PrecisionArg::Int8Block => Self::Int8Block,
            PrecisionArg::Int4 => Self::Int4,
        }
    }
}

/// Types of activations around block-quantised weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ActivationsArg {
    /// 32-bit floats
    Fp32,
    /// 16-bit floats
    Fp16,
}

/// Ways to round 4-bit weights.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RoundingArg {
    /// The scale from each block's extremes
    Nearest,
    /// The scale with the least error of those tried
    Search,
}

/// Targets that export writes for.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum TargetArg {
    /// ONNX Runtime's CPU and CUDA providers, with its fused operators in the decoder
    Ort,
    /// Standard operators only, as TensorRT takes them
    Tensorrt,
    /// This project's own operators: int8 on the CPU, the fastest there
    Cpu,
}

impl From<TargetArg> for Target {
    fn from(target: TargetArg) -> Self {
        match target {
            TargetArg::Ort => Self::Ort,
            TargetArg::Tensorrt => Self::TensorRt,
            TargetArg::Cpu => Self::Cpu,
        }
    }
}

/// `recaption run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Images, folders, webdataset tars, Parquet files or brace ranges of them, as paths or URLs; - for a list on standard input
    #[arg(required = true, value_name = "INPUT")]
    pub inputs: Vec<String>,
    /// Folder of the bundle, made by `recaption export`
    ///
    /// Example: --model bundles/llava-8b
    #[arg(long, value_name = "BUNDLE_DIR")]
    pub model: PathBuf,
    /// Folder for the captions; without it they go to standard output as JSON Lines
    ///
    /// Holds captions-{shard}.parquet for each input shard, run.json (the settings) and summary.json. The same command
    /// again goes on where the last one ended, and several processes may share the folder. s3://, gs:// and az:// need
    /// --work-dir beside it. Example: --out captions
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Format of the files in --out [default: parquet]
    ///
    /// Standard output has JSON Lines only. Example: --format jsonl
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// Add the column token_ids
    ///
    /// Example: --with-token-ids
    #[arg(long)]
    pub with_token_ids: bool,
    /// Folder on a local disk for the journals of shards in progress
    ///
    /// Default: --out; needed where that is in an object store. A run that goes on must be given the same one.
    /// Example: --work-dir /var/tmp/recaption
    #[arg(long, value_name = "DIR", requires = "out")]
    pub work_dir: Option<PathBuf>,
    /// Longest time, in seconds, that a finished caption may be lost to a power loss
    ///
    /// 0 syncs after every caption. A run that is only killed loses none, whatever is set here. Example: --sync-interval 30
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = parse_seconds)]
    pub sync_interval: f64,
    /// Do only the I-th of N parts of the shards
    ///
    /// For machines that share no disk, or one without file locks. Each must be given the same inputs in the same order.
    /// Processes that share --out need no parts: each takes shards that no other has. Example: --part 2/8
    #[arg(long, value_name = "I/N", conflicts_with = "limit")]
    pub part: Option<Part>,
    /// Do the failed rows of finished shards again, and no others of them
    ///
    /// Example: --retry-failed
    #[arg(long, requires = "out", conflicts_with = "overwrite")]
    pub retry_failed: bool,
    /// Give up when more images than this fail, or a larger share of them
    ///
    /// Of the images of this run; a share counts from the 100th on. What is done is kept. Example: --max-failures 5%
    #[arg(long, value_name = "N|P%")]
    pub max_failures: Option<MaxFailures>,
    /// Take no locks in --out: for filesystems that have none
    ///
    /// Then no two processes may write into it at once, except with --part. Example: --no-claims
    #[arg(long, requires = "out")]
    pub no_claims: bool,
    /// Time, in seconds, without a sign of life after which a shard of another machine is taken over
    ///
    /// With --out in an object store; on a disk a lock tells at once. Example: --claim-timeout 600
    #[arg(long, value_name = "SECONDS", default_value_t = 150.0, value_parser = parse_seconds)]
    pub claim_timeout: f64,
    /// Start anew: delete the captions in --out first
    ///
    /// Example: --overwrite
    #[arg(long, requires = "out")]
    pub overwrite: bool,
    /// Print summary.json to standard output at the end
    ///
    /// Example: --json
    #[arg(long, requires = "out")]
    pub json: bool,
    /// Serve Prometheus metrics of the run, at a port on loopback or at an address
    ///
    /// Rows, tokens, queues, slots and times, at /metrics; docs/metrics.md lists them. Port 0 is any that is free. Example:
    /// --metrics 9090
    #[arg(long, value_name = "PORT|ADDR", value_parser = live::parse_address)]
    pub metrics: Option<SocketAddr>,
    /// Let the disk refuse an OPERATION from its COUNT-th time on, to test that what was written before is kept
    #[arg(long, hide = true, value_name = "OPERATION:COUNT:KIND")]
    pub inject_io_error: Option<Fault>,
    /// How captions are made.
    #[command(flatten)]
    pub captioning: CaptioningArgs,
}

/// `recaption profile`.
#[derive(Args, Debug)]
pub struct ProfileArgs {
    /// Images, folders, webdataset tars, Parquet files or brace ranges of them, as paths or URLs; - for a list on standard input
    #[arg(required = true, value_name = "INPUT")]
    pub inputs: Vec<String>,
    /// Folder of the bundle, made by `recaption export`
    ///
    /// Example: --model bundles/llava-8b
    #[arg(long, value_name = "BUNDLE_DIR")]
    pub model: PathBuf,
    /// Folder for profile.json, trace.json and report.html; those of an earlier profile are replaced
    ///
    /// Captions are written there while the run goes on, as `run` writes them, and deleted at its end. Example: --out profile
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Add ONNX Runtime's own times of each operator, summed by the part of the model that it belongs to
    ///
    /// Measuring each operator takes time itself: look at the shares here, and at the stages without this flag.
    /// Example: --ort-profile
    #[arg(long)]
    pub ort_profile: bool,
    /// Leave out the measurement of the machine's peaks, and the shares of them
    ///
    /// Example: --no-peaks
    #[arg(long)]
    pub no_peaks: bool,
    /// Print profile.json to standard output, not the table
    ///
    /// Example: --json
    #[arg(long)]
    pub json: bool,
    /// Run without recording, to measure what recording costs
    #[arg(long, hide = true)]
    pub no_record: bool,
    /// How captions are made.
    #[command(flatten)]
    pub captioning: CaptioningArgs,
}

/// How captions are made: what `run` and `profile` have in common.
#[derive(Args, Debug)]
pub struct CaptioningArgs {
    /// What runs the graphs
    ///
    /// The first line of a run says what it took. cuda and tensorrt run the vision tower and the projector of an fp32 bundle
    /// on the GPU and its decoder on the CPU, since ONNX Runtime's CUDA attention takes fp16 and bf16 only; auto keeps all
    /// of it on the CPU. Example: --provider cuda
    #[arg(long, value_enum, default_value_t = ProviderArg::Auto)]
    pub provider: ProviderArg,
    /// GPU index, with --provider cuda or tensorrt; several make one engine each [default: 0]
    ///
    /// Example: --device 0,1
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', allow_negative_numbers = true, value_parser = parse_device)]
    pub device: Option<Vec<i32>>,
    /// What the model is asked
    ///
    /// The default is that of the Recap-DataComp-1B paper: "Please generate a detailed caption of this image. Please be as
    /// descriptive as possible." Example: --prompt "Describe the image in one sentence."
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_PROMPT, hide_default_value = true)]
    pub prompt: String,
    /// Frame around the prompt: llava-pp-llama3, llava-next-llama3, plain-llama3, or a Jinja file
    ///
    /// Default: the checkpoint's own chat template if it places an image, else llava-pp-llama3. Example: --template
    /// plain-llama3
    #[arg(long, value_name = "NAME_OR_FILE")]
    pub template: Option<TemplateChoice>,
    /// Most new tokens of a caption, the stop token counted
    ///
    /// Example: --max-new-tokens 64
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_new_tokens: u32,
    /// Treat a stop token like any other: every caption has --max-new-tokens tokens
    ///
    /// For benchmarks. Example: --ignore-eos
    #[arg(long)]
    pub ignore_eos: bool,
    /// Captions in flight per engine
    ///
    /// Default: as many as fit into the memory, up to 16 on a CPU (32 with --target cpu) and 256 on a GPU, for each engine; the first lines of a run
    /// show what that takes of the memory.
    /// Example: --slots 32
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub slots: Option<u16>,
    /// Most images encoded and prefilled at once
    ///
    /// Default: 4 on a CPU (1 with --target cpu), up to 16 on a GPU, or --slots if that is less. Example: --vision-batch 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub vision_batch: Option<u16>,
    /// CPU threads for the graphs, shared among the engines
    ///
    /// Default: all cores. Example: --threads 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Engines on the CPU: each has its own sessions, slots and share of --threads
    ///
    /// Default: one for each thread with bundles of --target cpu (at most 16), else 1. Example: --engines 2
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub engines: Option<u16>,
    /// Threads that decode images, and as many that resize them
    ///
    /// Default: a quarter of the cores, at least 1. Example: --load-threads 4
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub load_threads: Option<u16>,
    /// Caption only the first N images
    ///
    /// Example: --limit 1000
    #[arg(long, value_name = "N", value_parser = parse_limit)]
    pub limit: Option<usize>,
    /// Column of .parquet inputs that holds the images [default: the one of bytes, or the one named image, jpg, …]
    ///
    /// Bytes, or a struct of `bytes` and `path`. Example: --image-column photo
    #[arg(long, value_name = "NAME")]
    pub image_column: Option<String>,
    /// How often a request to an object store or web server is tried again
    ///
    /// After server errors, broken connections and time-outs, with waits from 0.1 s that double up to 15 s, for 4 minutes at
    /// most. Example: --storage-retries 3
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub storage_retries: usize,
    /// Seconds after which a request to an object store or web server is given up
    ///
    /// Example: --storage-timeout 20
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub storage_timeout: u64,
    /// Show no progress and no summary on standard error
    ///
    /// Example: --quiet
    #[arg(long, short)]
    pub quiet: bool,
    /// Share of a GPU's free memory that may be used [default: 0.9]
    ///
    /// The rest is for what cannot be planned. With --provider cuda or tensorrt. Example: --gpu-memory-utilization 0.8
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    pub gpu_memory_utilization: Option<f64>,
    /// Run decode steps one kernel at a time, not as CUDA graphs
    ///
    /// Graphs take memory and some seconds at the start, and make small steps faster. With --provider cuda or tensorrt.
    /// Example: --no-cuda-graphs
    #[arg(long)]
    pub no_cuda_graphs: bool,
    /// Folder where TensorRT keeps the engines it has built
    ///
    /// Default: beside the bundle, BUNDLE_DIR.tensorrt. Engines are good for one model, GPU and pair of ONNX Runtime and
    /// TensorRT: each gets a folder in it. With --provider tensorrt. Example: --engine-cache /var/cache/engines
    #[arg(long, value_name = "DIR")]
    pub engine_cache: Option<PathBuf>,
    /// Pad batches as on a GPU, to test it on a CPU
    #[arg(long, hide = true)]
    pub fixed_shapes: bool,
    /// Let ENGINE:STEP[:start|:panic] fail, to test that its images are not lost
    #[arg(long, hide = true, value_name = "ENGINE:STEP")]
    pub inject_failure: Option<Injection>,
    /// Panic in STAGE:N, at its item N, to test that a run ends well
    #[arg(long, hide = true, value_name = "STAGE[:N]", value_parser = parse_injection)]
    pub inject_panic: Option<(Stage, usize)>,
    /// What the inputs may cost.
    // Last: its heading holds for all flags that follow.
    #[command(flatten)]
    pub limits: LimitArgs,
}

/// `recaption inspect`.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// Folder of the bundle, made by `recaption export`
    #[arg(value_name = "BUNDLE_DIR")]
    pub bundle: PathBuf,
    /// Print JSON, with exact numbers
    ///
    /// Sizes are bytes, and arithmetic is floating-point operations. Example: --json
    #[arg(long)]
    pub json: bool,
    /// Read all files and compare their SHA-256 with the manifest's
    ///
    /// Names each file that differs, is missing or is extra. Without it only sizes are compared. Example: --verify
    #[arg(long)]
    pub verify: bool,
    /// Tokens of text around the image, for memory and arithmetic
    ///
    /// The default is what the paper's prompt and its frame take. Example: --prompt-tokens 100
    #[arg(long, value_name = "N", default_value_t = DEFAULT_PROMPT_TOKENS, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub prompt_tokens: u32,
    /// New tokens of a caption, for arithmetic
    ///
    /// The stop token is one of them. Example: --new-tokens 128
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub new_tokens: u32,
}

/// `recaption plan`.
#[derive(Args, Debug)]
pub struct PlanArgs {
    /// A bundle's folder, a checkpoint's folder, a config.json, or one of llava-llama-3-8b, llava-1.5-7b, llava-1.5-13b [default: that of --from]
    ///
    /// Only dimensions are read. Example: --model bundles/llava-8b
    #[arg(long, value_name = "MODEL", required_unless_present = "from")]
    pub model: Option<String>,
    /// A GPU of the table, for instance h100-sxm; a wrong name lists them all
    ///
    /// Rates are those of the makers' datasheets, without sparsity. Example: --device-kind a100-80
    #[arg(long, value_name = "KIND", conflicts_with_all = ["measure", "peak_tflops"])]
    pub device_kind: Option<String>,
    /// Another GPU: dense fp16 rate in 10^12 operations a second
    ///
    /// With --bandwidth and --memory. Example: --peak-tflops 312 --bandwidth 2.0 --memory 80
    #[arg(long, value_name = "TFLOPS", requires = "bandwidth", requires = "memory", value_parser = parse_positive)]
    pub peak_tflops: Option<f64>,
    /// Its dense fp8 rate, where it has that arithmetic
    ///
    /// Example: --peak-fp8-tflops 624
    #[arg(long, value_name = "TFLOPS", requires = "peak_tflops", value_parser = parse_positive)]
    pub peak_fp8_tflops: Option<f64>,
    /// Its memory bandwidth in 10^12 bytes a second
    ///
    /// Example: --bandwidth 2.0
    #[arg(long, value_name = "TB/S", requires = "peak_tflops", value_parser = parse_positive)]
    pub bandwidth: Option<f64>,
    /// Its memory in 10^9 bytes
    ///
    /// Example: --memory 80
    #[arg(long, value_name = "GB", requires = "peak_tflops", value_parser = parse_positive)]
    pub memory: Option<f64>,
    /// This machine's processor: measures what it can do, some seconds long
    ///
    /// As `recaption profile` does. For fp32 and integers: a CPU multiplies no shorter floats. Example: --measure
    #[arg(long)]
    pub measure: bool,
    /// Scale from this run: a profile.json of `recaption profile`, or the folder that it is in
    ///
    /// The device is the profile's, unless --device-kind names another of its sort; lengths, slots and batches are the profile's
    /// where nothing else is said. Example: --from profiles/today/profile.json
    #[arg(long, value_name = "FILE", conflicts_with = "measure")]
    pub from: Option<PathBuf>,
    /// Images to caption, as a number: 1000000 or 1.3e9
    ///
    /// Example: --images 1.3e9
    #[arg(long, value_name = "N", value_parser = parse_images)]
    pub images: Option<f64>,
    /// Devices that share the images
    ///
    /// Example: --devices 512
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub devices: u64,
    /// Price of one device for an hour, in any currency
    ///
    /// Example: --price-per-hour 2.5
    #[arg(long, value_name = "PRICE", requires = "images", value_parser = parse_positive)]
    pub price_per_hour: Option<f64>,
    /// Precision that a checkpoint would be exported with [default: fp16, or int8 with --measure]
    ///
    /// Not with a bundle, which has its own. Example: --precision fp8
    #[arg(long, value_enum, requires = "model")]
    pub precision: Option<PrecisionArg>,
    /// Target that a checkpoint would be exported for [default: ort, tensorrt for fp8, or cpu for int8 with --measure]
    ///
    /// Not with a bundle, which has its own. Example: --target tensorrt
    #[arg(long, value_enum, requires = "model")]
    pub target: Option<TargetArg>,
    /// Tokens of text around the image [default: 60, or the profile's]
    ///
    /// The paper's prompt and its frame take 60. Example: --prompt-tokens 100
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub prompt_tokens: Option<u32>,
    /// Mean new tokens of a caption, its stop token among them [default: 64, or the profile's]
    ///
    /// The paper's captions have 49 words, about 64 tokens. Example: --new-tokens 100
    #[arg(long, value_name = "N", value_parser = parse_mean_tokens)]
    pub new_tokens: Option<f64>,
    /// Most new tokens of a caption, which slots have room for [default: 128, or the profile's]
    ///
    /// Example: --max-new-tokens 64
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_new_tokens: Option<u32>,
    /// Captions in flight per engine [default: as `recaption run` would take]
    ///
    /// Example: --slots 512
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub slots: Option<u16>,
    /// Most images encoded and prefilled at once [default: as `recaption run` would take]
    ///
    /// Example: --vision-batch 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub vision_batch: Option<u16>,
    /// Engines on each device [default: 1, the profile's, or one per core with --target cpu]
    ///
    /// Example: --engines 2
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub engines: Option<u16>,
    /// Cores that each device has for reading and preprocessing [default: enough]
    ///
    /// Example: --cores 8
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    pub cores: Option<f64>,
    /// Share of the device's memory that may be used
    ///
    /// Example: --gpu-memory-utilization 0.8
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = parse_share)]
    pub gpu_memory_utilization: f64,
    /// Print JSON
    ///
    /// Sizes are bytes, rates per second, shares between 0 and 1. Example: --json
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `recaption doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Say for each provider whether it runs this bundle
    ///
    /// Example: --model bundles/llava-8b
    #[arg(long, value_name = "BUNDLE_DIR")]
    pub model: Option<PathBuf>,
    /// Print JSON
    ///
    /// Sizes are bytes, rates operations per second. Example: --json
    #[arg(long)]
    pub json: bool,
}

/// Formats of `--format`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FormatArg {
    /// One Parquet file per shard, zstd-compressed
    Parquet,
    /// One JSON Lines file per shard
    Jsonl,
    /// One webdataset tar per shard: the images as they were, with captions and columns beside them
    Webdataset,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Parquet => Self::Parquet,
            FormatArg::Jsonl => Self::Jsonl,
            FormatArg::Webdataset => Self::Webdataset,
        }
    }
}

/// Providers of `--provider`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProviderArg {
    /// The best that works here
    Auto,
    /// The CPU
    Cpu,
    /// CUDA
    Cuda,
    /// TensorRT for vision, and for decoders of --target tensorrt; CUDA for the others
    Tensorrt,
}

impl From<ProviderArg> for ProviderChoice {
    fn from(provider: ProviderArg) -> Self {
        match provider {
            ProviderArg::Auto => Self::Auto,
            ProviderArg::Cpu => Self::Cpu,
            ProviderArg::Cuda => Self::Cuda,
            ProviderArg::Tensorrt => Self::TensorRt,
        }
    }
}

fn parse_device(text: &str) -> Result<i32, String> {
    let index = text.trim().parse::<i32>().ok().filter(|index| *index >= 0);
    index.ok_or_else(|| {
        format!("expected GPU numbers such as `0` or `0,1`, got `{text}`\nhint: `recaption doctor` lists the GPUs that are there")
    })
}

fn parse_limit(text: &str) -> Result<usize, String> {
    let limit = text.parse::<usize>().ok().filter(|limit| *limit > 0);
    limit.ok_or_else(|| {
        format!("expected a number of images from 1 on, got `{text}`\nhint: leave --limit out to caption all of them")
    })
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| format!("expected a number above 0 and up to 1, got `{text}`"))
}

fn parse_positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number > 0.0 && number.is_finite());
    number.ok_or_else(|| format!("expected a number above 0, got `{text}`"))
}

fn parse_images(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (1.0..=1e15).contains(number));
    number.map(f64::round).ok_or_else(|| format!("expected a number from 1 to 1e15, got `{text}`"))
}

fn parse_mean_tokens(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| (1.0..=1e6).contains(number));
    number.ok_or_else(|| format!("expected a number from 1 to 1e6, got `{text}`"))
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.0..=86_400.0).contains(seconds));
    seconds.ok_or_else(|| format!("expected seconds from 0 to 86400, got `{text}`"))
}

fn parse_injection(text: &str) -> Result<(Stage, usize), String> {
    let (stage, count) = text.split_once(':').unwrap_or((text, "0"));
    Ok((stage.parse()?, count.parse().map_err(|_| format!("expected a number, got `{count}`"))?))
}
