//! The entry point of `librecaption_operators`, under the name that ONNX Runtime looks for: what
//! `SessionOptions.register_custom_ops_library` of its Python package, or `RegisterCustomOpsLibrary` of its C API, calls.

use std::thread::available_parallelism;

use ort::AsPointer;
use ort::sys::{OrtApi, OrtApiBase, OrtErrorCode, OrtSessionOptions, OrtStatusPtr};
use recaption_kernels::Level;

/// Version of ONNX Runtime's API that is asked for: 1.22 and later have it.
const API_VERSION: u32 = 22;

/// Adds the operators to `options`. They stay for as long as the process does.
///
/// # Safety
/// As ONNX Runtime calls it: both pointers are valid, `options` for the length of the call, `base` for ever.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RegisterCustomOps(options: *mut OrtSessionOptions, base: *const OrtApiBase) -> OrtStatusPtr {
    // SAFETY: by contract; an API stays where it is.
    let api: Option<&'static OrtApi> = unsafe { ((*base).GetApi)(API_VERSION).as_ref() };
    // SAFETY: as above; every version has the first API.
    let first_api: Option<&'static OrtApi> = unsafe { ((*base).GetApi)(1).as_ref() };
    let fail = |reason: String| match first_api {
        Some(api) => {
            let reason = std::ffi::CString::new(reason).unwrap_or_default();
            // SAFETY: a zero-terminated text, which is copied.
            unsafe { (api.CreateStatus)(OrtErrorCode::ORT_FAIL, reason.as_ptr()) }
        }
        None => OrtStatusPtr(std::ptr::null_mut()),
    };
    let Some(api) = api else { return fail(format!("expected ONNX Runtime 1.{API_VERSION} or later")) };
    ort::set_api(api.clone());
    let level = match Level::current() {
        Ok(level) => level,
        Err(error) => return fail(error.to_string()),
    };
    let num_threads = available_parallelism().map_or(1, usize::from);
    match crate::domain(level, num_threads) {
        // SAFETY: the options are alive, and the domain is never dropped.
        Ok(domain) => unsafe { (api.AddCustomOpDomain)(options, Box::leak(Box::new(domain)).ptr().cast_mut()) },
        Err(error) => fail(error.to_string()),
    }
}
