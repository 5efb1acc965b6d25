//! Integration tests: one binary, a module per behaviour. References come from transformers, Pillow and the real
//! tokenizer; `scripts/golden/` makes them, `scripts/fetch_test_data.sh` fetches what is not committed.

#![expect(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod allocations;
mod bad_inputs;
mod claims;
mod clip;
mod command_line;
mod crash;
mod demo;
mod doctor;
mod engines;
mod full_disk;
mod fuzz_seeds;
mod golden;
mod hints;
mod hostile;
mod independence;
mod inspect;
mod layouts;
mod library;
mod load;
mod logs;
mod memory;
mod metrics;
mod operators_library;
mod parity;
mod pillow;
mod plan;
mod precisions;
mod preprocessing;
mod profile;
mod remote;
mod remote_faults;
mod resume;
mod servers;
mod shards;
mod shutdown;
mod signals;
mod sinks;
mod sources;
mod storage;
mod support;
mod text;
