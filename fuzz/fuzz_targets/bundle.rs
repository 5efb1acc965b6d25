#![no_main]
#[allow(dead_code)]
#[path = "../src/export.rs"]
mod export;
libfuzzer_sys::fuzz_target!(|data: &[u8]| export::bundle(data));
