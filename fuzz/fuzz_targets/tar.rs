#![no_main]
#[allow(dead_code)]
#[path = "../src/run.rs"]
mod run;
libfuzzer_sys::fuzz_target!(|data: &[u8]| run::tar(data));
