#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| recaption_fuzz::export::bundle(data));
