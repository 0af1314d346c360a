//! What the machine has written to its console, as text that can be searched.

use regex::bytes::Regex;

/// Text beyond this many bytes is dropped from the front, half of it at a time: a guest may print for ever.
const KEEP: usize = 16 << 20;

/// The console's text without carriage returns, other control characters and the terminal's escape sequences
/// (ECMA-48, 5.4: control sequences).
#[derive(Clone, Debug, Default)]
pub struct Text {
    bytes: Vec<u8>,
    /// How many bytes were dropped from the front.
    dropped: usize,
    lines: usize,
    line_start: usize,
    escape: Escape,
    end: Option<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Escape {
    #[default]
    None,
    /// ESC.
    Start,
    /// ESC [: parameters up to the final byte.
    Control,
    /// ESC ]: a string up to BEL or ESC \.
    String,
    /// ESC inside such a string.
    StringEnd,
    /// ESC and an intermediate byte: one more byte.
    OneMore,
}

impl Text {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what came from the console.
    pub fn push(&mut self, raw: &[u8]) {
        for &byte in raw {
            self.push_byte(byte);
        }
        if self.bytes.len() > KEEP {
            let cut = self.bytes.len() - KEEP / 2;
            self.bytes.drain(..cut);
            self.dropped += cut;
            self.line_start = self.line_start.max(self.dropped);
        }
    }

    fn push_byte(&mut self, byte: u8) {
        const ESC: u8 = 0x1b;
        const BEL: u8 = 7;
        self.escape = match (self.escape, byte) {
            (Escape::None | Escape::Start | Escape::Control | Escape::OneMore, ESC) => Escape::Start,
            (Escape::None, b'\n') => {
                self.end_line();
                Escape::None
            }
            (Escape::None, b'\t' | 0x20..=0x7e | 0x80..) => {
                self.bytes.push(byte);
                Escape::None
            }
            (Escape::None, _) => Escape::None,
            (Escape::Start, b'[') => Escape::Control,
            (Escape::Start, b']') => Escape::String,
            (Escape::Start, 0x20..=0x2f) => Escape::OneMore,
            (Escape::Start | Escape::OneMore, _) => Escape::None,
            (Escape::Control, 0x20..=0x3f) => Escape::Control,
            // A line feed inside a sequence is a broken sequence; the line is worth more.
            (Escape::Control, b'\n') => {
                self.end_line();
                Escape::None
            }
            (Escape::Control, _) => Escape::None,
            (Escape::String | Escape::StringEnd, ESC) => Escape::StringEnd,
            (Escape::String, BEL) | (Escape::StringEnd, b'\\') => Escape::None,
            (Escape::String | Escape::StringEnd, _) => Escape::String,
        };
    }

    fn end_line(&mut self) {
        if let Some(status) = status_of(self.unfinished_line()) {
            self.end = Some(status);
        }
        self.bytes.push(b'\n');
        self.lines += 1;
        self.line_start = self.len();
    }

    /// How much text there has been, in bytes.
    pub fn len(&self) -> usize {
        self.dropped + self.bytes.len()
    }

    /// Whether there has been no text.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many lines have been finished.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// The text from position `from` on, or what is left of it.
    pub fn since(&self, from: usize) -> &[u8] {
        &self.bytes[from.saturating_sub(self.dropped).min(self.bytes.len())..]
    }

    /// The last line, which has no end yet.
    pub fn unfinished_line(&self) -> &[u8] {
        self.since(self.line_start)
    }

    /// Where the unfinished line starts.
    pub fn line_start(&self) -> usize {
        self.line_start
    }

    /// The first match of `regex` at or after `from`: its text and where it ends.
    pub fn find(&self, regex: &Regex, from: usize) -> Option<(String, usize)> {
        let text = self.since(from);
        let found = regex.find(text)?;
        let end = self.len() - text.len() + found.end();
        Some((String::from_utf8_lossy(found.as_bytes()).into_owned(), end))
    }

    /// As [`Text::find`], but a line ends only where the machine has ended it: `$` does not match where the unfinished
    /// line happens to stop, so `.*$` waits for the rest.
    pub fn find_ended(&self, regex: &Regex, from: usize) -> Option<(String, usize)> {
        let mut text = self.since(from).to_vec();
        let start = self.len() - text.len();
        // A byte that no pattern matches, for it is not UTF-8, and that is not the end of the text.
        text.push(0xff);
        let found = regex.find(&text)?;
        Some((String::from_utf8_lossy(found.as_bytes()).into_owned(), start + found.end()))
    }

    /// The status in Umbra's last line, once it has been printed.
    pub fn end_status(&self) -> Option<u8> {
        self.end
    }
}

/// The status in the line with which Umbra ends a run: `umbra: end: status N`.
fn status_of(line: &[u8]) -> Option<u8> {
    std::str::from_utf8(line).ok()?.trim_end().strip_prefix("umbra: end: status ")?.parse().ok()
}

/// The status in a finished log, as [`Text::end_status`] finds it.
pub fn end_status(log: &str) -> Option<u8> {
    log.lines().rev().find_map(|line| status_of(line.as_bytes()))
}

/// A regular expression as `--until` and the scenarios use it: `^` and `$` are the ends of a line.
pub fn line_regex(pattern: &str) -> Result<Regex, regex::Error> {
    regex::bytes::RegexBuilder::new(pattern).multi_line(true).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(parts: &[&[u8]]) -> Text {
        let mut text = Text::new();
        parts.iter().for_each(|part| text.push(part));
        text
    }

    fn shown(text: &Text) -> String {
        String::from_utf8_lossy(text.since(0)).into_owned()
    }

    #[test]
    fn what_only_a_terminal_understands_is_left_out() {
        let text =
            text(&[b"a\r\nb\x1b[3", b"1mred\x1b[0m \x1b]0;title\x07ok\x1b(B!\x1b[6n\x1b]x\x1b\\.\x00\x08"]);
        assert_eq!(shown(&text), "a\nbred ok!.");
        assert_eq!(text.unfinished_line(), b"bred ok!.");
        assert_eq!(text.lines(), 1);
    }

    #[test]
    fn a_broken_sequence_does_not_swallow_the_next_line() {
        assert_eq!(shown(&text(&[b"x\x1b[12\numbra: end: status 3\n"])), "x\numbra: end: status 3\n");
    }

    #[test]
    fn the_end_line_counts_only_whole_and_alone() {
        assert_eq!(text(&[b"umbra: end: sta", b"tus 0\r\n"]).end_status(), Some(0));
        assert_eq!(text(&[b"umbra: end: status 233\n"]).end_status(), Some(233));
        for other in [
            &b"umbra: end: status 0"[..],
            b"# echo umbra: end: status 0\n",
            b"umbra: end: status 256\n",
            b"umbra: end: status\n",
        ] {
            assert_eq!(text(&[other]).end_status(), None, "{}", other.escape_ascii());
        }
        assert_eq!(end_status("a\numbra: end: status 65\nb\n"), Some(65));
        assert_eq!(end_status(""), None);
    }

    #[test]
    fn a_match_ends_where_the_next_search_starts() {
        let text = text(&[b"one two\r\none three\r\n"]);
        let regex = line_regex("^one").unwrap();
        let (_, end) = text.find(&regex, 0).unwrap();
        assert_eq!(end, 3);
        let (_, end) = text.find(&regex, end).unwrap();
        assert_eq!(end, 11);
        assert_eq!(text.find(&regex, end), None);
        assert_eq!(text.find(&line_regex("two$").unwrap(), 0), Some(("two".into(), 7)));
    }

    #[test]
    fn a_line_ends_only_where_the_machine_ends_it() {
        let mut text = text(&[b"x\r\nerror: half"]);
        let whole = line_regex("^error: .*$").unwrap();
        assert_eq!(text.find(&whole, 0), Some(("error: half".into(), 13)));
        assert_eq!(text.find_ended(&whole, 0), None);
        assert_eq!(text.find_ended(&line_regex("^error: [^x]").unwrap(), 9), None);
        assert_eq!(text.find_ended(&line_regex("^error: ").unwrap(), 2), Some(("error: ".into(), 9)));
        text.push(b" a line\r\n");
        assert_eq!(text.find_ended(&whole, 0), Some(("error: half a line".into(), 20)));
        assert_eq!(text.find_ended(&line_regex("^$").unwrap(), text.len()), None);
    }

    #[test]
    fn endless_output_does_not_need_endless_memory() {
        let mut text = Text::new();
        let line = [b'x'; 1 << 20];
        for _ in 0..40 {
            text.push(&line);
        }
        assert!(text.bytes.len() <= KEEP);
        assert_eq!(text.len(), 40 << 20);
        text.push(b"\nend\n");
        assert!(text.find(&line_regex("^end$").unwrap(), 0).is_some());
        assert_eq!(text.since(usize::MAX), b"");
    }
}
