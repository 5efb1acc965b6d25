//! The `.json` beside an image.

use serde_json::{Map, Value};

use crate::pipeline::source::limits::is_deeper_than;

/// A sidecar's object. Python writes NaN and infinities, which JSON has no word for: they become null. What is no object
/// at all comes back as its text.
pub(super) fn parse_sidecar(json: &[u8], max_depth: usize) -> Result<Map<String, Value>, String> {
    if is_deeper_than(json, max_depth) {
        return Err(String::from_utf8_lossy(json).into_owned());
    }
    let parse = |json: &[u8]| match serde_json::from_slice(json) {
        Ok(Value::Object(fields)) => Some(fields),
        _ => None,
    };
    parse(json).or_else(|| parse(&without_non_finite(json))).ok_or_else(|| String::from_utf8_lossy(json).into_owned())
}

/// `NaN`, `Infinity` and `-Infinity` outside of strings replaced by `null`.
fn without_non_finite(json: &[u8]) -> Vec<u8> {
    let mut clean = Vec::with_capacity(json.len());
    let mut is_in_string = false;
    let mut rest = json;
    while let [byte, tail @ ..] = rest {
        if is_in_string && *byte == b'\\' && !tail.is_empty() {
            clean.extend(&rest[..2]);
            rest = &tail[1..];
            continue;
        }
        is_in_string ^= *byte == b'"';
        let words: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];
        match words.iter().find(|word| !is_in_string && rest.starts_with(word)) {
            Some(word) => {
                clean.extend(b"null");
                rest = &rest[word.len()..];
            }
            None => {
                clean.push(*byte);
                rest = tail;
            }
        }
    }
    clean
}

/// Removes a text field; a field of another type stays in the metadata.
pub(super) fn take_text(fields: &mut Map<String, Value>, name: &str) -> Option<String> {
    match fields.get(name) {
        Some(Value::String(_)) => match fields.shift_remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        Some(Value::Null) => {
            fields.shift_remove(name);
            None
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_has_no_word_for_become_null() {
        let fields = parse_sidecar(br#"{"url": "a NaN \" Infinity", "score": NaN, "low": -Infinity}"#, 9).unwrap();
        assert_eq!(fields["url"], "a NaN \" Infinity");
        assert!(fields["score"].is_null() && fields["low"].is_null());
        assert_eq!(parse_sidecar(b"[1]", 9), Err("[1]".to_owned()));
    }
}
