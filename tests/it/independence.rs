//! A caption does not depend on its slot, its neighbours, the batch or the engine: fp32 ids are the same.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::support::{demo_bundle, demo_shard, parquet_rows, printed_rows, recaption, stderr};

/// Ids of each key under the given settings.
fn ids(inputs: &[&str], extra: &[&str]) -> BTreeMap<String, Value> {
    let bundle = demo_bundle();
    let mut args = vec!["run"];
    args.extend(inputs);
    args.extend(["--model", bundle.to_str().unwrap(), "--with-token-ids", "--quiet", "--provider", "cpu"]);
    args.extend(extra);
    let output = recaption(&args);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let rows = printed_rows(&output);
    rows.into_iter().map(|row| (row["key"].as_str().unwrap().to_owned(), row["token_ids"].clone())).collect()
}

#[test]
fn batched_captions_equal_those_made_one_at_a_time() {
    let shard = demo_shard();
    let inputs = [shard.to_str().unwrap()];
    let alone = ids(&inputs, &["--slots", "1"]);
    assert_eq!(alone.len(), 64);
    let lengths: std::collections::BTreeSet<usize> = alone.values().map(|ids| ids.as_array().unwrap().len()).collect();
    assert!(lengths.len() > 1, "captions of one length never move between slots: the test shows nothing");
    for settings in [
        &["--slots", "8", "--vision-batch", "1"][..],
        &["--slots", "8", "--vision-batch", "4"],
        &["--slots", "32", "--vision-batch", "32"],
        &["--slots", "5", "--vision-batch", "3", "--threads", "1"],
        &["--slots", "4", "--engines", "2"],
    ] {
        assert_eq!(ids(&inputs, settings), alone, "{settings:?}");
    }
}

#[test]
fn rows_come_in_input_order_whatever_finishes_first() {
    let (bundle, shard) = (demo_bundle(), demo_shard());
    let out = tempfile::tempdir().unwrap();
    let args = ["run", shard.to_str().unwrap(), "--model", bundle.to_str().unwrap(), "--engines", "2", "--slots", "7"];
    let output = recaption(&[&args[..], &["--out", out.path().to_str().unwrap(), "--quiet"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let keys: Vec<String> =
        parquet_rows(out.path()).iter().map(|row| row["key"].as_str().unwrap().to_owned()).collect();
    assert_eq!(keys, (0..64).map(|i| format!("{i:09}")).collect::<Vec<_>>());
}
