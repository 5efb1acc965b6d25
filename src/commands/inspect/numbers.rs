//! Numbers for people: three digits and a prefix.

/// `1.90 GB`
pub(in crate::commands) fn bytes(count: u64) -> String {
    scaled(count, ["B", "kB", "MB", "GB", "TB", "PB", "EB"])
}

/// `3.74 TFLOP`
pub(in crate::commands) fn flops(count: u64) -> String {
    scaled(count, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])
}

/// `8.03 G`
pub(in crate::commands) fn count(count: u64) -> String {
    scaled(count, ["", "k", "M", "G", "T", "P", "E"]).trim_end().to_owned()
}

/// `1 row`, `2 rows`
pub(in crate::commands) fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// `12.3 ms`
pub(in crate::commands) fn duration(seconds: f64) -> String {
    // From nanoseconds up the units are a thousand apart; above a second there is no other unit to take.
    let (value, unit) = match seconds {
        _ if seconds == 0.0 => (0.0, "s"),
        _ if seconds < 999.5e-9 => (seconds * 1e9, "ns"),
        _ if seconds < 999.5e-6 => (seconds * 1e6, "us"),
        _ if seconds < 999.5e-3 => (seconds * 1e3, "ms"),
        _ => (seconds, "s"),
    };
    format!("{value:.0$} {unit}", num_decimals(value))
}

/// `7.32`, `73.2`, `732`
pub(in crate::commands) fn number(value: f64) -> String {
    format!("{value:.0$}", num_decimals(value))
}

/// Decimals that make three digits.
fn num_decimals(value: f64) -> usize {
    match value {
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    }
}

fn scaled(count: u64, units: [&str; 7]) -> String {
    let (mut value, mut index) = (count as f64, 0);
    // What would round to 1000 is 1 of the next unit.
    while value >= 999.5 && index + 1 < units.len() {
        value /= 1000.0;
        index += 1;
    }
    let num_decimals = if index == 0 { 0 } else { num_decimals(value) };
    format!("{value:.num_decimals$} {}", units[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.00 kB");
        assert_eq!(bytes(9_994_999), "9.99 MB");
        assert_eq!(bytes(9_995_000), "10.0 MB");
        assert_eq!(bytes(999_499_999), "999 MB");
        assert_eq!(bytes(999_500_000), "1.00 GB");
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!(flops(9_819_078_619_136), "9.82 TFLOP");
        assert_eq!(count(8_030_261_248), "8.03 G");
        assert_eq!(count(576), "576");
        let durations = [0.0, 12e-9, 4.5e-6, 999.4e-6, 999.6e-6, 0.0123, 1.0, 123.4];
        let shown = ["0.00 s", "12.0 ns", "4.50 us", "999 us", "1.00 ms", "12.3 ms", "1.00 s", "123 s"];
        assert_eq!(durations.map(duration), shown);
        assert_eq!([0.5, 73.21, 732.4].map(number), ["0.50", "73.2", "732"]);
    }
}
