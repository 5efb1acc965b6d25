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

fn scaled(count: u64, units: [&str; 7]) -> String {
    let (mut value, mut index) = (count as f64, 0);
    // What would round to 1000 is 1 of the next unit.
    while value >= 999.5 && index + 1 < units.len() {
        value /= 1000.0;
        index += 1;
    }
    let num_decimals = match value {
        _ if index == 0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    };
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
    }
}
