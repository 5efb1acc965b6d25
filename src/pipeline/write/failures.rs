//! Failed rows by reason, and when there are too many of them.

use std::collections::BTreeMap;
use std::str::FromStr;

/// Reasons that are told apart; further ones are counted together.
const MAX_CLASSES: usize = 64;
const OTHERS: &str = "others";
/// Longest name of a class, in characters.
const MAX_CLASS_CHARS: usize = 120;
/// Rows before a share of failures means anything.
const MIN_ROWS_FOR_SHARE: u64 = 100;

/// What failures of one kind have in common: the error without its advice, its numbers and what it quotes.
pub(crate) fn class(error: &str) -> String {
    let reason = error.split(';').next().unwrap_or_default();
    let mut class = String::new();
    let mut is_quoted = false;
    for char in reason.chars() {
        match char {
            '`' => {
                is_quoted = !is_quoted;
                class.push_str(if is_quoted { "`…" } else { "`" });
            }
            _ if is_quoted => {}
            '0'..='9' if class.ends_with('N') => {}
            '0'..='9' => class.push('N'),
            _ if char.is_control() => class.push(' '),
            _ => class.push(char),
        }
    }
    class.chars().take(MAX_CLASS_CHARS).collect::<String>().trim().to_owned()
}

/// Counts failures of a class.
pub(crate) fn add(classes: &mut BTreeMap<String, u64>, class: &str, count: u64) {
    let is_new = !classes.contains_key(class);
    let class = if is_new && classes.len() >= MAX_CLASSES { OTHERS } else { class };
    *classes.entry(class.to_owned()).or_default() += count;
}

/// The most frequent classes, as `12 × load: …`.
pub(crate) fn most_frequent(classes: &BTreeMap<String, u64>, count: usize) -> Vec<String> {
    let mut sorted: Vec<_> = classes.iter().collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    sorted.iter().take(count).map(|(class, count)| format!("{count} × {class}")).collect()
}

/// How many failed rows a run takes before it is taken to have gone wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MaxFailures {
    /// More failed rows than this.
    Count(u64),
    /// A larger share (0 to 1) of failed rows among those of this run, once there are 100.
    Share(f64),
}

impl MaxFailures {
    /// Whether `failed` of `rows` rows are too many.
    #[must_use]
    pub fn is_exceeded(self, failed: u64, rows: u64) -> bool {
        match self {
            Self::Count(count) => failed > count,
            Self::Share(share) => rows >= MIN_ROWS_FOR_SHARE && failed as f64 > share * rows as f64,
        }
    }
}

impl FromStr for MaxFailures {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || format!("expected a number of rows or a share such as 5%, got `{text}`");
        match text.strip_suffix('%') {
            Some(share) => {
                let share = share.parse::<f64>().ok().filter(|share| (0.0..=100.0).contains(share));
                share.map(|share| Self::Share(share / 100.0)).ok_or_else(expected)
            }
            None => text.parse().map(Self::Count).map_err(|_| expected()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_one_kind_have_one_class() {
        let cut = |bytes| format!("load: truncated JPEG image (ends after {bytes} bytes); fetch it again");
        assert_eq!(class(&cut(812)), "load: truncated JPEG image (ends after N bytes)");
        assert_eq!(class(&cut(9)), class(&cut(1_000_000)));
        assert_eq!(class("source: cannot read `/data/3.jpg`: gone"), "source: cannot read `…`: gone");
        assert_eq!(class("load: \u{1b}[31mred"), "load:  [Nmred");
    }

    #[test]
    fn a_share_counts_from_a_hundred_rows_on() {
        let share: MaxFailures = "5%".parse().unwrap();
        assert!(!share.is_exceeded(99, 99) && share.is_exceeded(6, 100) && !share.is_exceeded(5, 100));
        let count: MaxFailures = "3".parse().unwrap();
        assert!(!count.is_exceeded(3, 3) && count.is_exceeded(4, 1000));
        assert!("five".parse::<MaxFailures>().is_err() && "101%".parse::<MaxFailures>().is_err());
    }

    #[test]
    fn the_number_of_classes_is_bounded() {
        let mut classes = BTreeMap::new();
        for index in 0..1000 {
            add(&mut classes, &format!("reason {}", (b'a' + (index % 26) as u8) as char).repeat(index / 26 + 1), 1);
        }
        assert_eq!(classes.len(), MAX_CLASSES + 1);
        assert_eq!(classes.values().sum::<u64>(), 1000);
    }
}
