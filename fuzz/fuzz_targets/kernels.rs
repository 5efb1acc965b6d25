#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| recaption_fuzz::kernels::kernels(data));
