//! The few functions of the CUDA runtime library that order work on a GPU, loaded at run time: streams, copies between
//! host and device, and how much memory is free. Signatures as in cuda_runtime_api.h of CUDA 12 and 13.
//!
//! ONNX Runtime's own copies wait for the device; these do not, so a decode step costs one wait.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};

/// Names of the library; 13 is what the ONNX Runtime in use links to.
const NAMES: [&str; 2] = ["libcudart.so.13", "libcudart.so.12"];
/// `cudaStreamNonBlocking`: no order with the default stream.
const STREAM_NON_BLOCKING: c_uint = 1;
/// `cudaMemcpyDefault`: the addresses tell the direction.
const MEMCPY_DEFAULT: c_int = 4;
/// `cudaDevAttrMultiProcessorCount`, `cudaDevAttrComputeCapabilityMajor` and `…Minor`.
const ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
const ATTRIBUTE_CAPABILITY: [c_int; 2] = [75, 76];

type Status = c_int;
type StreamHandle = *mut c_void;
type EventHandle = *mut c_void;

/// Functions of the loaded library.
struct CudaRuntime {
    set_device: unsafe extern "C" fn(c_int) -> Status,
    stream_create: unsafe extern "C" fn(*mut StreamHandle, c_uint) -> Status,
    stream_destroy: unsafe extern "C" fn(StreamHandle) -> Status,
    stream_synchronize: unsafe extern "C" fn(StreamHandle) -> Status,
    memcpy: unsafe extern "C" fn(*mut c_void, *const c_void, usize, c_int, StreamHandle) -> Status,
    memcpy_2d:
        unsafe extern "C" fn(*mut c_void, usize, *const c_void, usize, usize, usize, c_int, StreamHandle) -> Status,
    memset: unsafe extern "C" fn(*mut c_void, c_int, usize, StreamHandle) -> Status,
    get_device_count: unsafe extern "C" fn(*mut c_int) -> Status,
    mem_get_info: unsafe extern "C" fn(*mut usize, *mut usize) -> Status,
    device_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Status,
    event_create: unsafe extern "C" fn(*mut EventHandle, c_uint) -> Status,
    event_destroy: unsafe extern "C" fn(EventHandle) -> Status,
    event_record: unsafe extern "C" fn(EventHandle, StreamHandle) -> Status,
    event_elapsed_time: unsafe extern "C" fn(*mut f32, EventHandle, EventHandle) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    _library: Library,
}

impl CudaRuntime {
    /// The library at `path`, or where the system's loader finds one.
    fn load(path: Option<&Path>) -> std::result::Result<Self, libloading::Error> {
        let candidates = path.map_or_else(|| NAMES.map(Path::new).to_vec(), |path| vec![path]);
        // SAFETY: loading runs the library's initialisers; it is NVIDIA's, or what the caller put there.
        let load = |name: &Path| unsafe { Library::new(name) };
        let library = candidates.into_iter().map(load).reduce(|found, next| found.or(next));
        let library = library.expect("bug: there are candidates")?;
        // SAFETY: the symbols have the types of the fields, by cuda_runtime_api.h; the library lives as long as they do.
        unsafe {
            Ok(Self {
                set_device: *library.get(b"cudaSetDevice")?,
                stream_create: *library.get(b"cudaStreamCreateWithFlags")?,
                stream_destroy: *library.get(b"cudaStreamDestroy")?,
                stream_synchronize: *library.get(b"cudaStreamSynchronize")?,
                memcpy: *library.get(b"cudaMemcpyAsync")?,
                memcpy_2d: *library.get(b"cudaMemcpy2DAsync")?,
                memset: *library.get(b"cudaMemsetAsync")?,
                get_device_count: *library.get(b"cudaGetDeviceCount")?,
                mem_get_info: *library.get(b"cudaMemGetInfo")?,
                device_attribute: *library.get(b"cudaDeviceGetAttribute")?,
                event_create: *library.get(b"cudaEventCreateWithFlags")?,
                event_destroy: *library.get(b"cudaEventDestroy")?,
                event_record: *library.get(b"cudaEventRecord")?,
                event_elapsed_time: *library.get(b"cudaEventElapsedTime")?,
                error_string: *library.get(b"cudaGetErrorString")?,
                _library: library,
            })
        }
    }

    fn check(&self, doing: &'static str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the function takes any number and returns a static, zero-terminated text.
        let text = unsafe { CStr::from_ptr((self.error_string)(status)) };
        Err(Error::Cuda { doing, status, reason: text.to_string_lossy().into_owned() })
    }
}

/// The library of this process.
fn cuda_runtime() -> Result<&'static CudaRuntime> {
    static RUNTIME: OnceLock<std::result::Result<CudaRuntime, String>> = OnceLock::new();
    let runtime = RUNTIME.get_or_init(|| CudaRuntime::load(None).map_err(|error| reason(&error)));
    runtime.as_ref().map_err(|reason| Error::Cuda { doing: "load the CUDA runtime", status: 0, reason: reason.clone() })
}

/// The loader's own words, which the error keeps as its source.
pub(super) fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A queue of work on one GPU: what is put into it runs in order, and not before it must.
pub(crate) struct CudaStream {
    runtime: &'static CudaRuntime,
    device: i32,
    handle: StreamHandle,
}

// SAFETY: CUDA streams may be used from any thread; the handle is only destroyed by the last owner.
unsafe impl Send for CudaStream {}
// SAFETY: as above; each call makes the stream's device the thread's current one first.
unsafe impl Sync for CudaStream {}

impl CudaStream {
    /// A new stream on the GPU of index `device`.
    pub(super) fn new(device: i32) -> Result<Self> {
        Self::with_runtime(cuda_runtime()?, device)
    }

    fn with_runtime(runtime: &'static CudaRuntime, device: i32) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: a device index may be any number; the handle is written on success.
        unsafe {
            runtime.check("choose the GPU", (runtime.set_device)(device))?;
            runtime.check("make a CUDA stream", (runtime.stream_create)(&raw mut handle, STREAM_NON_BLOCKING))?;
        }
        Ok(Self { runtime, device, handle })
    }

    /// As the providers take it.
    pub(super) fn handle(&self) -> *mut () {
        self.handle.cast()
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: takes any number.
        self.runtime.check("choose the GPU", unsafe { (self.runtime.set_device)(self.device) })
    }

    /// # Safety
    /// Both addresses are good for `num_bytes` until the copy is over, and do not overlap.
    pub(super) unsafe fn copy(&self, to: *mut u8, from: *const u8, num_bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's.
        let status = unsafe { (self.runtime.memcpy)(to.cast(), from.cast(), num_bytes, MEMCPY_DEFAULT, self.handle) };
        self.runtime.check("copy", status)
    }

    /// Copies `num_rows` rows of `row_bytes` that lie `pitch` bytes apart.
    ///
    /// # Safety
    /// As [`Self::copy`], for each row.
    pub(super) unsafe fn copy_rows(&self, to: *mut u8, from: *const u8, rows: Rows) -> Result<()> {
        self.enter()?;
        let Rows { num_rows, row_bytes, pitch } = rows;
        // SAFETY: the caller's.
        let status = unsafe {
            (self.runtime.memcpy_2d)(
                to.cast(),
                pitch,
                from.cast(),
                pitch,
                row_bytes,
                num_rows,
                MEMCPY_DEFAULT,
                self.handle,
            )
        };
        self.runtime.check("copy rows", status)
    }

    /// # Safety
    /// `to` is device memory of `num_bytes`.
    pub(super) unsafe fn zero(&self, to: *mut u8, num_bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's.
        self.runtime.check("zero memory", unsafe { (self.runtime.memset)(to.cast(), 0, num_bytes, self.handle) })
    }

    /// Waits until everything put into the stream is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive.
        self.runtime.check("wait for the GPU", unsafe { (self.runtime.stream_synchronize)(self.handle) })
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        // A GPU that failed may refuse; there is nothing more to be done with it.
        // SAFETY: nobody else has the handle any more.
        let _ = unsafe { (self.runtime.stream_destroy)(self.handle) };
    }
}

/// A moment of a GPU's stream.
struct CudaEvent {
    runtime: &'static CudaRuntime,
    handle: EventHandle,
}

// SAFETY: CUDA events may be used from any thread; the handle is only destroyed by its owner.
unsafe impl Send for CudaEvent {}

impl CudaEvent {
    fn new(runtime: &'static CudaRuntime) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is written on success.
        runtime.check("make a CUDA event", unsafe { (runtime.event_create)(&raw mut handle, 0) })?;
        Ok(Self { runtime, handle })
    }

    fn record(&self, stream: &CudaStream) -> Result<()> {
        stream.enter()?;
        // SAFETY: event and stream are alive.
        self.runtime.check("record a CUDA event", unsafe { (self.runtime.event_record)(self.handle, stream.handle) })
    }
}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        // As with streams: there is nothing to be done about a refusal.
        // SAFETY: nobody else has the handle any more.
        let _ = unsafe { (self.runtime.event_destroy)(self.handle) };
    }
}

/// Times the work between two moments of a stream, on the GPU's own clock.
pub(super) struct CudaTimer {
    begin: CudaEvent,
    end: CudaEvent,
}

impl CudaTimer {
    pub(super) fn new(stream: &CudaStream) -> Result<Self> {
        stream.enter()?;
        Ok(Self { begin: CudaEvent::new(stream.runtime)?, end: CudaEvent::new(stream.runtime)? })
    }

    pub(super) fn begin(&self, stream: &CudaStream) -> Result<()> {
        self.begin.record(stream)
    }

    pub(super) fn end(&self, stream: &CudaStream) -> Result<()> {
        self.end.record(stream)
    }

    /// Nanoseconds between the two; the host must have waited for the stream since.
    pub(super) fn elapsed_ns(&self) -> Result<u64> {
        let (runtime, mut milliseconds) = (self.begin.runtime, 0.0_f32);
        // SAFETY: both events are alive; the number is written on success.
        let status = unsafe { (runtime.event_elapsed_time)(&raw mut milliseconds, self.begin.handle, self.end.handle) };
        runtime.check("read a CUDA event", status)?;
        Ok((f64::from(milliseconds) * 1e6) as u64)
    }
}

/// Equal pieces at equal distances.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) num_rows: usize,
    pub(crate) row_bytes: usize,
    /// Bytes from the start of one row to that of the next.
    pub(crate) pitch: usize,
}

/// Free and total bytes of a GPU's memory.
pub(crate) fn memory(device: i32) -> Result<(usize, usize)> {
    let runtime = cuda_runtime()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: the numbers are written on success.
    unsafe {
        runtime.check("choose the GPU", (runtime.set_device)(device))?;
        runtime.check("ask for free memory", (runtime.mem_get_info)(&raw mut free, &raw mut total))?;
    }
    Ok((free, total))
}

/// GPUs that may be used.
pub(crate) fn num_devices() -> Result<i32> {
    let runtime = cuda_runtime()?;
    let mut count = 0;
    // SAFETY: the number is written on success.
    runtime.check("count the GPUs", unsafe { (runtime.get_device_count)(&raw mut count) })?;
    Ok(count)
}

fn attribute(device: i32, attribute: i32) -> Result<i32> {
    let runtime = cuda_runtime()?;
    let mut value = 0;
    // SAFETY: the number is written on success.
    let status = unsafe { (runtime.device_attribute)(&raw mut value, attribute, device) };
    runtime.check("ask for the GPU's kind", status).map(|()| value)
}

/// A GPU's compute capability: `(9, 0)`.
pub(crate) fn capability(device: i32) -> Result<(i32, i32)> {
    let [major, minor] = ATTRIBUTE_CAPABILITY;
    Ok((attribute(device, major)?, attribute(device, minor)?))
}

/// What tells this GPU's kind from others: `sm90-132-79g` is compute capability 9.0, 132 multiprocessors, 79 GiB.
pub(crate) fn kind(device: i32) -> Result<String> {
    let ((major, minor), multiprocessors) = (capability(device)?, attribute(device, ATTRIBUTE_MULTIPROCESSORS)?);
    Ok(format!("sm{major}{minor}-{multiprocessors}-{}g", memory(device)?.1 >> 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A CUDA runtime whose copies happen when the host waits, as late as they may: what reads too early reads old values.
    const FAKE: &str = r#"
        #include <stdlib.h>
        #include <string.h>
        typedef struct { char *to; const char *from; size_t to_pitch, from_pitch, width, height; int value; } Work;
        typedef struct { Work work[64]; int count; } Stream;
        static int device = -1;
        int cudaSetDevice(int index) { if (index > 1) return 101; device = index; return 0; }
        int cudaStreamCreateWithFlags(Stream **stream, unsigned flags) {
            if (flags != 1) return 1;
            *stream = calloc(1, sizeof(Stream));
            return 0;
        }
        int cudaStreamDestroy(Stream *stream) { free(stream); return 0; }
        static int push(Stream *stream, Work work) {
            if (stream->count == 64) return 2;
            stream->work[stream->count++] = work;
            return 0;
        }
        int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              int kind, Stream *stream) {
            if (kind != 4 || width > to_pitch || width > from_pitch) return 12;
            return push(stream, (Work){to, from, to_pitch, from_pitch, width, height, 0});
        }
        int cudaMemcpyAsync(void *to, const void *from, size_t count, int kind, Stream *stream) {
            return cudaMemcpy2DAsync(to, count, from, count, count, 1, kind, stream);
        }
        int cudaMemsetAsync(void *to, int value, size_t count, Stream *stream) {
            return push(stream, (Work){to, 0, 0, 0, count, 1, value});
        }
        int cudaStreamSynchronize(Stream *stream) {
            for (int i = 0; i < stream->count; i++) {
                Work w = stream->work[i];
                for (size_t row = 0; row < w.height; row++) {
                    if (w.from) memcpy(w.to + row * w.to_pitch, w.from + row * w.from_pitch, w.width);
                    else memset(w.to, w.value, w.width);
                }
            }
            stream->count = 0;
            return 0;
        }
        int cudaEventCreateWithFlags(int **event, unsigned flags) { *event = calloc(1, sizeof(int)); return flags; }
        int cudaEventDestroy(int *event) { free(event); return 0; }
        int cudaEventRecord(int *event, Stream *stream) { *event = stream->count + 1; return 0; }
        int cudaEventElapsedTime(float *milliseconds, int *begin, int *end) {
            if (!*begin || !*end) return 400;
            *milliseconds = 0.5f * (*end - *begin);
            return 0;
        }
        int cudaGetDeviceCount(int *count) { *count = 2; return 0; }
        int cudaMemGetInfo(size_t *free, size_t *total) { *free = 3; *total = 4; return 0; }
        int cudaDeviceGetAttribute(int *value, int attribute, int index) { *value = attribute + index; return 0; }
        const char *cudaGetErrorString(int status) { return status == 101 ? "invalid device ordinal" : "other"; }
    "#;

    fn fake() -> &'static CudaRuntime {
        static RUNTIME: OnceLock<CudaRuntime> = OnceLock::new();
        RUNTIME.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let (source, library) = (folder.path().join("cudart.c"), folder.path().join("libcudart.so"));
            std::fs::write(&source, FAKE).unwrap();
            let compiled = std::process::Command::new("cc")
                .args(["-shared", "-fPIC", "-Wno-incompatible-pointer-types", "-o"])
                .args([&library, &source])
                .output()
                .unwrap();
            assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
            CudaRuntime::load(Some(&library)).unwrap()
        })
    }

    #[test]
    fn work_is_queued_in_order_and_done_when_the_host_waits() {
        let stream = CudaStream::with_runtime(fake(), 1).unwrap();
        let source: Vec<u8> = (0..40).collect();
        let mut target = [255_u8; 40];
        // SAFETY: the addresses and sizes are those of the arrays, which outlive the waits.
        unsafe {
            stream.zero(target.as_mut_ptr(), 40).unwrap();
            stream.copy(target.as_mut_ptr(), source.as_ptr(), 4).unwrap();
            let rows = Rows { num_rows: 3, row_bytes: 2, pitch: 8 };
            stream.copy_rows(target.as_mut_ptr().add(10), source.as_ptr().add(10), rows).unwrap();
        }
        assert_eq!(target, [255; 40], "nothing is done before the wait");
        stream.synchronize().unwrap();
        let mut expected = [0_u8; 40];
        for i in [0, 1, 2, 3, 10, 11, 18, 19, 26, 27] {
            expected[i] = i as u8;
        }
        assert_eq!(target, expected);
    }

    /// The fake's clock ticks half a millisecond for each piece of work.
    #[test]
    fn a_timer_reads_the_streams_own_clock() {
        let stream = CudaStream::with_runtime(fake(), 0).unwrap();
        let timer = CudaTimer::new(&stream).unwrap();
        assert!(timer.elapsed_ns().is_err(), "nothing was recorded");
        let mut target = [0_u8; 8];
        timer.begin(&stream).unwrap();
        for _ in 0..3 {
            // SAFETY: the array outlives the wait.
            unsafe { stream.zero(target.as_mut_ptr(), 8).unwrap() };
        }
        timer.end(&stream).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(timer.elapsed_ns().unwrap(), 1_500_000);
        assert_eq!(target, [0; 8]);
    }

    #[test]
    fn a_refusal_says_what_was_done_and_why() {
        let error = CudaStream::with_runtime(fake(), 7).err().unwrap();
        assert_eq!(error.to_string(), "CUDA, choose the GPU: invalid device ordinal (101)");
    }
}
