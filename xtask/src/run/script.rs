//! Input that nobody types: lines from a pipe or a file, sent when the guest is ready for them.
//!
//! A serial line has no flow control that a booting guest honours. Linux empties the UART's FIFO when the console is
//! opened, and its terminal layer drops what exceeds 4 KiB, so bytes sent early or all at once get lost. A script is
//! therefore sent line by line, each when the guest shows a prompt: our Linux guest's, or an unfinished line of output
//! that ends like one, and then nothing for a moment. A command that reads its input without a prompt gets the next line
//! after a longer silence.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::emulator::Text;
use crate::guest::PROMPT;

/// A prompt has not changed for this long.
const SETTLED: Duration = Duration::from_millis(150);

/// After the first prompt: this long without output, the next line is sent all the same.
const SILENCE: Duration = Duration::from_secs(3);

/// Before the first prompt: as long, for guests that show none. Far longer than any pause of a booting Linux.
const FIRST_SILENCE: Duration = Duration::from_secs(60);

/// A line of the script may come in pieces, but the rest of it does not keep the guest waiting longer than this.
const PIECE: Duration = Duration::from_millis(500);

/// The script's bytes, and what is known of the guest's readiness.
#[derive(Debug)]
pub(super) struct Script {
    pending: VecDeque<u8>,
    ended: bool,
    supplied_at: Instant,
    output_at: Instant,
    seen: usize,
    /// What the console shows before this position was there when the last line was sent.
    answered: usize,
    /// How many lines the console must have finished before an unfinished one can be a new prompt.
    lines_due: usize,
    prompt: bool,
    prompted: bool,
}

impl Script {
    /// A script with nothing in it yet.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            pending: VecDeque::new(),
            ended: false,
            supplied_at: now,
            output_at: now,
            seen: 0,
            answered: 0,
            lines_due: 0,
            prompt: false,
            prompted: false,
        }
    }

    /// Whether more of the script should be read now; the rest can wait in its pipe.
    pub(super) fn wants_more(&self) -> bool {
        !self.ended && self.pending.len() < 1 << 16
    }

    /// Takes more of the script; nothing at all is its end.
    pub(super) fn supply(&mut self, bytes: &[u8], now: Instant) {
        self.pending.extend(bytes);
        self.ended = bytes.is_empty();
        self.supplied_at = now;
    }

    /// Looks at the console and returns what to send now.
    pub(super) fn next(&mut self, console: &Text, now: Instant) -> Option<Vec<u8>> {
        if console.len() != self.seen {
            self.seen = console.len();
            self.output_at = now;
            self.prompt = self.asks(console);
        }
        let quiet = now.duration_since(self.output_at);
        let ready = if self.prompt && quiet >= SETTLED {
            self.prompted = true;
            true
        } else {
            quiet >= if self.prompted { SILENCE } else { FIRST_SILENCE }
        };
        if !ready {
            return None;
        }
        let line = self.take_line(now)?;
        self.prompt = false;
        self.answered = console.len();
        // The guest echoes the line, so the prompt still stands in it until the line ends.
        self.lines_due = console.lines() + usize::from(line.last() == Some(&b'\n'));
        self.output_at = now;
        Some(line)
    }

    fn asks(&self, console: &Text) -> bool {
        // The known prompt may be followed by a message of the kernel, which hides it from the second test.
        let known = console.since(self.answered).windows(PROMPT.len()).any(|part| part == PROMPT.as_bytes());
        known || console.lines() >= self.lines_due && is_prompt(console.unfinished_line())
    }

    fn take_line(&mut self, now: Instant) -> Option<Vec<u8>> {
        let len = match self.pending.iter().position(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None if self.ended || now.duration_since(self.supplied_at) >= PIECE => self.pending.len(),
            None => 0,
        };
        (len > 0).then(|| self.pending.drain(..len).collect())
    }
}

/// Whether an unfinished line of output asks for input.
fn is_prompt(line: &[u8]) -> bool {
    let text = line.trim_ascii_end();
    // A prompt is short; a long unfinished line is output in the making.
    text.len() < 120 && matches!(text.last(), Some(b'#' | b'$' | b'>' | b'%' | b':' | b'?'))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Guest {
        text: Text,
        now: Instant,
        script: Script,
    }

    impl Guest {
        fn new(input: &str) -> Self {
            let now = Instant::now();
            let mut script = Script::new(now);
            script.supply(input.as_bytes(), now);
            script.supply(b"", now);
            Self { text: Text::new(), now, script }
        }

        fn prints(&mut self, output: &str) -> Option<String> {
            self.text.push(output.as_bytes());
            self.sent()
        }

        fn after(&mut self, ms: u64) -> Option<String> {
            self.now += Duration::from_millis(ms);
            self.sent()
        }

        fn sent(&mut self) -> Option<String> {
            self.script.next(&self.text, self.now).map(|bytes| String::from_utf8(bytes).unwrap())
        }
    }

    #[test]
    fn a_line_waits_for_its_prompt() {
        let mut guest = Guest::new("echo $((6*7))\npoweroff\n");
        assert_eq!(guest.prints("umbra: booting\r\n[    0.000000] Linux version"), None);
        assert_eq!(guest.after(10_000), None);
        assert_eq!(guest.prints("\r\n~ # \x1b[6n"), None);
        assert_eq!(guest.after(100), None);
        assert_eq!(guest.after(100).as_deref(), Some("echo $((6*7))\n"));
        assert_eq!(guest.after(500), None, "the prompt that was answered does not count again");
        assert_eq!(guest.prints("echo $"), None);
        assert_eq!(guest.after(500), None, "an echo in the making is not a prompt");
        assert_eq!(guest.prints("((6*7))\r\n42\r\n~ # "), None);
        assert_eq!(guest.after(200).as_deref(), Some("poweroff\n"));
        assert_eq!(guest.after(100_000), None);
    }

    #[test]
    fn a_kernel_message_does_not_hide_the_prompt() {
        let mut guest = Guest::new("a\nb\n");
        guest.prints("umbra-guest# \x1b[6n[    2.178824] tsc: Refined TSC clocksource calibration\r\n");
        assert_eq!(guest.after(200).as_deref(), Some("a\n"));
        guest.prints("a\r\noutput\r\n");
        assert_eq!(guest.after(1_000), None, "the old prompt does not count");
        guest.prints("umbra-guest# ");
        assert_eq!(guest.after(200).as_deref(), Some("b\n"));
    }

    #[test]
    fn a_reader_without_a_prompt_is_served_after_a_silence() {
        let mut guest = Guest::new("read x\nvalue\n");
        guest.prints("$ ");
        assert_eq!(guest.after(200).as_deref(), Some("read x\n"));
        guest.prints("read x\r\n");
        assert_eq!(guest.after(2_000), None);
        assert_eq!(guest.after(1_500).as_deref(), Some("value\n"));
    }

    #[test]
    fn a_guest_without_any_prompt_is_served_in_the_end() {
        let mut guest = Guest::new("x\n");
        guest.prints("ready\r\n");
        assert_eq!(guest.after(59_000), None);
        assert_eq!(guest.after(2_000).as_deref(), Some("x\n"));
    }

    #[test]
    fn the_last_line_may_lack_its_end() {
        let mut guest = Guest::new("ls\npoweroff");
        guest.prints("# ");
        assert_eq!(guest.after(200).as_deref(), Some("ls\n"));
        guest.prints("ls\r\n# ");
        assert_eq!(guest.after(200).as_deref(), Some("poweroff"));
    }

    #[test]
    fn a_line_that_comes_in_pieces_is_sent_whole() {
        let mut guest = Guest::new("");
        guest.script = Script::new(guest.now);
        guest.script.supply(b"ec", guest.now);
        guest.prints("# ");
        assert_eq!(guest.after(200), None);
        guest.script.supply(b"ho\n", guest.now);
        assert_eq!(guest.sent().as_deref(), Some("echo\n"));
        assert!(guest.script.wants_more());
        guest.script.supply(b"", guest.now);
        assert!(!guest.script.wants_more());
    }

    #[test]
    fn prompts_are_known_by_their_end() {
        for line in ["/ # ", "$", "login: ", "> ", "Password:", "(y/n)? "] {
            assert!(is_prompt(line.as_bytes()), "{line}");
        }
        for line in ["", "   ", "Loading", "[    0.1] x.", &"x".repeat(200)] {
            assert!(!is_prompt(line.as_bytes()), "{line}");
        }
    }
}
