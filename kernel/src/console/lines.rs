//! Keeps Umbra's lines and guests' bytes apart on one console. Pure.

use core::fmt::{self, Write};

/// What every line of Umbra's own begins with.
pub const PREFIX: &str = "umbra: ";

/// Where bytes go.
pub trait Sink {
    /// Sends bytes as they are.
    fn put(&mut self, bytes: &[u8]);
}

/// A console shared by Umbra's lines and raw output.
pub struct Lines<S> {
    sink: S,
    at_line_start: bool,
}

impl<S: Sink> Lines<S> {
    /// A console whose cursor is at the start of a line.
    pub const fn new(sink: S) -> Self {
        Self { sink, at_line_start: true }
    }

    /// The device below.
    pub fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Raw bytes, as a guest sends them; they may end in the middle of a line.
    pub fn raw(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last() {
            self.sink.put(bytes);
            self.at_line_start = *last == b'\n';
        }
    }

    /// Raw parts as one line of their own, on a fresh line.
    pub fn line(&mut self, parts: &[&[u8]]) {
        if !self.at_line_start {
            self.sink.put(b"\r\n");
        }
        for part in parts {
            self.sink.put(part);
        }
        self.sink.put(b"\r\n");
        self.at_line_start = true;
    }

    /// One message of Umbra's own, on a fresh line; each of its lines gets the prefix.
    pub fn message(&mut self, label: &str, message: fmt::Arguments<'_>) {
        if !self.at_line_start {
            self.sink.put(b"\r\n");
        }
        // If this message is cut off for good, by a panic elsewhere, the next one begins on a fresh line.
        self.at_line_start = false;
        self.sink.put(PREFIX.as_bytes());
        self.sink.put(label.as_bytes());
        // The sink cannot fail; a Display that does has its message cut off.
        let _ = Prefixed(&mut self.sink).write_fmt(message);
        self.sink.put(b"\r\n");
        self.at_line_start = true;
    }
}

struct Prefixed<'a, S>(&'a mut S);

impl<S: Sink> Write for Prefixed<'_, S> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (i, line) in text.split('\n').enumerate() {
            if i > 0 {
                self.0.put(b"\r\n");
                self.0.put(PREFIX.as_bytes());
            }
            self.0.put(line.as_bytes());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Sink for Vec<u8> {
        fn put(&mut self, bytes: &[u8]) {
            self.extend_from_slice(bytes);
        }
    }

    fn lines(test: impl FnOnce(&mut Lines<Vec<u8>>)) -> String {
        let mut lines = Lines::new(Vec::new());
        test(&mut lines);
        String::from_utf8(lines.sink).unwrap()
    }

    #[test]
    fn a_message_after_half_a_line_starts_on_a_fresh_one() {
        let text = lines(|l| {
            l.message("", format_args!("one"));
            l.raw(b"login: ");
            l.message("error: ", format_args!("two"));
            l.raw(b"");
            l.message("", format_args!("three"));
            l.raw(b"done\r\n");
            l.message("", format_args!("four"));
        });
        assert_eq!(
            text,
            "umbra: one\r\nlogin: \r\numbra: error: two\r\numbra: three\r\ndone\r\numbra: four\r\n"
        );
    }

    #[test]
    fn every_line_of_a_message_has_the_prefix() {
        let text = lines(|l| l.message("", format_args!("a{}c\n", "\nb")));
        assert_eq!(text, "umbra: a\r\numbra: bc\r\numbra: \r\n");
    }
}
