//! What a program prints: kept up to a limit, first and last half, every byte counted. The writer never waits for a reader.

use std::borrow::Cow;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One stream. Memory grows with what is printed, up to the limit.
#[derive(Debug, Clone)]
pub struct Capture {
    head: Vec<u8>,
    /// Ring buffer of the last bytes once the head is full; `oldest` is where it starts.
    tail: Vec<u8>,
    oldest: usize,
    half: usize,
    total: u64,
}

impl Capture {
    /// Keeps at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { head: Vec::new(), tail: Vec::new(), oldest: 0, half: (limit / 2).max(1), total: 0 }
    }

    /// Takes what was printed next.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let (to_head, mut rest) = bytes.split_at(bytes.len().min(self.half - self.head.len()));
        self.head.extend_from_slice(to_head);
        if rest.len() > self.half {
            rest = &rest[rest.len() - self.half..];
        }
        let (growing, wrapping) = rest.split_at(rest.len().min(self.half - self.tail.len()));
        self.tail.extend_from_slice(growing);
        for part in wrapping.chunks(self.half - self.oldest.min(self.half - 1)) {
            let mut part = part;
            while !part.is_empty() {
                let room = self.half - self.oldest;
                let (now, later) = part.split_at(part.len().min(room));
                self.tail[self.oldest..self.oldest + now.len()].copy_from_slice(now);
                self.oldest = (self.oldest + now.len()) % self.half;
                part = later;
            }
        }
    }

    /// Bytes printed in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Puts the kept bytes in order.
    #[must_use]
    pub fn finish(mut self) -> Captured {
        self.tail.rotate_left(self.oldest);
        let kept = (self.head.len() + self.tail.len()) as u64;
        if kept == self.total {
            self.head.append(&mut self.tail);
        }
        Captured { head: self.head, tail: self.tail, total: self.total }
    }
}

/// The end state of one stream: all of it in `head`, or its beginning and its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captured {
    head: Vec<u8>,
    tail: Vec<u8>,
    total: u64,
}

/// Room for the line that says what was left out.
const OMISSION_LINE: usize = 80;

impl Captured {
    /// A stream that holds just this text.
    #[must_use]
    pub fn text_only(text: &str) -> Self {
        Self { head: text.as_bytes().to_vec(), tail: Vec::new(), total: text.len() as u64 }
    }

    /// Bytes printed in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Whether anything was left out.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        self.total > (self.head.len() + self.tail.len()) as u64
    }

    /// The kept bytes, if they are all of the stream but not UTF-8, so that nothing is lost in [`Captured::text`].
    #[must_use]
    pub fn exact_bytes(&self) -> Option<Vec<u8>> {
        let broken = std::str::from_utf8(&self.head).is_err() || std::str::from_utf8(&self.tail).is_err();
        (broken && !self.is_truncated()).then(|| self.head.clone())
    }

    /// All that was kept, as text: with one line in the middle where something was left out.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        if !self.is_truncated() {
            return String::from_utf8_lossy(&self.head);
        }
        let (head, tail) = (whole_start(&self.head), whole_end(&self.tail));
        Cow::Owned(self.joined(head, tail))
    }

    /// The text, cut to at most `limit` bytes of UTF-8.
    #[must_use]
    pub fn text_within(&self, limit: usize) -> String {
        let text = self.text();
        if text.len() <= limit {
            return text.into_owned();
        }
        let all_valid = std::str::from_utf8(&self.head).is_ok() || self.is_truncated();
        // A byte that is not UTF-8 becomes three.
        let widest = if all_valid && !text.contains('\u{fffd}') { 1 } else { 3 };
        let room = limit.saturating_sub(OMISSION_LINE) / 2 / widest;
        let end = if self.tail.is_empty() { &self.head } else { &self.tail };
        let head = whole_start(&self.head[..room.min(self.head.len())]);
        let tail = whole_end(&end[end.len() - room.min(end.len())..]);
        self.joined(head, tail)
    }

    fn joined(&self, head: &[u8], tail: &[u8]) -> String {
        let omitted = self.total - (head.len() + tail.len()) as u64;
        let (head, tail) = (String::from_utf8_lossy(head), String::from_utf8_lossy(tail));
        let line_break = if head.ends_with('\n') { "" } else { "\n" };
        format!("{head}{line_break}[... {omitted} bytes left out ...]\n{tail}")
    }
}

/// Without a character that was cut at the end.
fn whole_start(bytes: &[u8]) -> &[u8] {
    for back in 1..=3.min(bytes.len()) {
        let byte = bytes[bytes.len() - back];
        if byte >= 0xC0 {
            let needed = if byte >= 0xF0 { 4 } else if byte >= 0xE0 { 3 } else { 2 };
            return if needed > back { &bytes[..bytes.len() - back] } else { bytes };
        }
        if byte < 0x80 {
            return bytes;
        }
    }
    bytes
}

/// Without the rest of a character that was cut at the start.
fn whole_end(bytes: &[u8]) -> &[u8] {
    let rest = bytes.iter().take(3).take_while(|byte| (0x80..0xC0).contains(*byte)).count();
    &bytes[rest..]
}

/// Both streams of one execution: written by its supervisor, read by anybody at any time.
#[derive(Debug)]
pub struct Output {
    streams: Mutex<[Capture; 2]>,
}

impl Output {
    /// Keeps at most `limit` bytes of each stream.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { streams: Mutex::new([Capture::new(limit), Capture::new(limit)]) }
    }

    /// Takes bytes of standard output.
    pub fn stdout(&self, bytes: &[u8]) {
        self.lock()[0].push(bytes);
    }

    /// Takes bytes of standard error.
    pub fn stderr(&self, bytes: &[u8]) {
        self.lock()[1].push(bytes);
    }

    /// What is there so far: (stdout, stderr).
    #[must_use]
    pub fn so_far(&self) -> (Captured, Captured) {
        let [stdout, stderr] = self.lock().clone();
        (stdout.finish(), stderr.finish())
    }

    /// Takes everything out: (stdout, stderr).
    #[must_use]
    pub fn take(&self) -> (Captured, Captured) {
        let mut streams = self.lock();
        let [stdout, stderr] = std::mem::replace(&mut *streams, [Capture::new(1), Capture::new(1)]);
        (stdout.finish(), stderr.finish())
    }

    fn lock(&self) -> MutexGuard<'_, [Capture; 2]> {
        // A panic elsewhere can't leave a capture half written: each push is complete or was never begun.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(limit: usize, pieces: &[&[u8]]) -> Captured {
        let mut capture = Capture::new(limit);
        pieces.iter().for_each(|piece| capture.push(piece));
        capture.finish()
    }

    #[test]
    fn everything_is_kept_up_to_the_limit_however_it_is_cut() {
        for step in 1..=20 {
            let data: Vec<u8> = (0..20).collect();
            let pieces: Vec<&[u8]> = data.chunks(step).collect();
            let captured = captured(20, &pieces);
            assert_eq!((captured.head, captured.total), (data.clone(), 20), "step {step}");
        }
    }

    #[test]
    fn beyond_the_limit_the_first_and_last_half_are_kept() {
        for step in [1, 3, 7, 10, 11, 33, 1000] {
            let data: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
            let pieces: Vec<&[u8]> = data.chunks(step).collect();
            let captured = captured(20, &pieces);
            assert_eq!(captured.head, data[..10], "step {step}");
            assert_eq!(captured.tail, data[990..], "step {step}");
            assert_eq!(captured.total, 1000);
        }
    }

    #[test]
    fn cut_text_names_what_is_missing_and_keeps_characters_whole() {
        let text = "ä".repeat(5000);
        let captured = captured(1 << 20, &[text.as_bytes()]);
        for limit in [1024, 1025, 1026, 4097] {
            let cut = captured.text_within(limit);
            assert!(cut.len() <= limit, "{} > {limit}", cut.len());
            assert!(!cut.contains('\u{fffd}'));
            assert!(cut.contains("bytes left out"));
        }
    }

    #[test]
    fn bytes_that_are_not_text_fit_as_well() {
        let captured = captured(1 << 20, &[&[0xFF; 100_000]]);
        assert!(captured.text_within(65_535).len() <= 65_535);
        assert_eq!(captured.exact_bytes().map(|bytes| bytes.len()), Some(100_000));
    }
}
