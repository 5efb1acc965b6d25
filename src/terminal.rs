//! What may be printed to a terminal: text of others (captions, keys, errors that quote them) must not move its cursor,
//! change its colours or set its title.

use std::borrow::Cow;

/// `text` with control characters as `\u{1b}`; newlines stay. The marks that turn the direction of writing around are
/// taken for control characters as well: they can make a line read as another.
#[must_use]
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let escaped = text.chars().map(|char| match is_harmful(char) {
        true => char.escape_unicode().to_string(),
        false => char.to_string(),
    });
    Cow::Owned(escaped.collect())
}

fn is_harmful(char: char) -> bool {
    let is_direction = matches!(char, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    (char.is_control() && char != '\n') || is_direction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_direction_marks_are_shown_not_obeyed() {
        assert_eq!(escape("a\u{1b}[2Jb\r\u{9b}1m\u{202e}c"), r"a\u{1b}[2Jb\u{d}\u{9b}1m\u{202e}c");
        assert!(matches!(escape("plain, ü, 漢, 🎸\nsecond line"), Cow::Borrowed(_)));
    }
}
