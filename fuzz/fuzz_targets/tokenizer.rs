#![no_main]

libfuzzer_sys::fuzz_target!(
    // The library's panics become errors, so they must not end the fuzzer before they are caught.
    init: std::panic::set_hook(Box::new(|_| {})),
    |data: &[u8]| recaption_fuzz::run::tokenizer(data)
);
