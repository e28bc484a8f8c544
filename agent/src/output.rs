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
        let (growing, mut wrapping) = rest.split_at(rest.len().min(self.half - self.tail.len()));
        self.tail.extend_from_slice(growing);
        while !wrapping.is_empty() {
            let (now, later) = wrapping.split_at(wrapping.len().min(self.half - self.oldest));
            self.tail[self.oldest..self.oldest + now.len()].copy_from_slice(now);
            self.oldest = (self.oldest + now.len()) % self.half;
            wrapping = later;
        }
    }

    /// A copy of at most `most` of the kept bytes: the first and the last.
    #[must_use]
    pub fn glimpse(&self, most: usize) -> Captured {
        if self.total <= most as u64 {
            return self.clone().finish();
        }
        let half = most / 2;
        let (newest, older) = self.tail.split_at(self.oldest);
        let mut tail = Vec::new();
        for part in [newest, older, &self.head] {
            let wanted = (half - tail.len()).min(part.len());
            tail.splice(0..0, part[part.len() - wanted..].iter().copied());
        }
        Captured { head: self.head[..half.min(self.head.len())].to_vec(), tail, total: self.total }
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

impl Captured {
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

    fn joined(&self, head: &[u8], tail: &[u8]) -> String {
        let omitted = self.total - (head.len() + tail.len()) as u64;
        join(&String::from_utf8_lossy(head), omitted, &String::from_utf8_lossy(tail))
    }
}

/// Head and tail with the one line between them that says how much was left out.
fn join(head: &str, omitted: u64, tail: &str) -> String {
    let line_break = if head.is_empty() || head.ends_with('\n') { "" } else { "\n" };
    format!("{head}{line_break}[... {omitted} bytes left out ...]\n{tail}")
}

/// Room for that line.
const OMISSION_LINE: usize = 80;

/// Cuts text to at most `limit` bytes: its head and its tail, with a line between them. `total` is how long the stream was
/// that the text was kept from, in bytes.
#[must_use]
pub fn fit(text: &str, total: u64, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let half = limit.saturating_sub(OMISSION_LINE) / 2;
    let head = &text[..text.floor_char_boundary(half)];
    let tail = &text[text.ceil_char_boundary(text.len() - half)..];
    let kept = (head.len() + tail.len()) as u64;
    // Text of bytes that were not UTF-8 is longer than the stream was.
    Cow::Owned(join(head, total.max(text.len() as u64) - kept, tail))
}

/// Without a character that was cut at the end.
fn whole_start(bytes: &[u8]) -> &[u8] {
    for back in 1..=3.min(bytes.len()) {
        let byte = bytes[bytes.len() - back];
        if byte >= 0xC0 {
            let needed = if byte >= 0xF0 {
                4
            } else if byte >= 0xE0 {
                3
            } else {
                2
            };
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

    /// The beginning and the end of what is there so far, at most so many bytes each: (stdout, stderr).
    #[must_use]
    pub fn so_far(&self, most: usize) -> (Captured, Captured) {
        let streams = self.lock();
        (streams[0].glimpse(most), streams[1].glimpse(most))
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
    fn a_glimpse_is_the_first_and_the_last_of_it() {
        for (limit, printed) in [(20, 1000_u32), (20, 15), (2000, 1000), (1200, 1000)] {
            let mut capture = Capture::new(limit);
            (0..printed).for_each(|n| capture.push(&[n as u8]));
            let glimpse = capture.glimpse(10);
            assert_eq!(glimpse.head, [0, 1, 2, 3, 4]);
            assert_eq!(glimpse.tail, (printed - 5..printed).map(|n| n as u8).collect::<Vec<_>>(), "{limit}");
            assert_eq!(glimpse.total, u64::from(printed));
        }
    }

    #[test]
    fn cut_text_names_what_is_missing_and_keeps_characters_whole() {
        let text = "ä".repeat(5000);
        for limit in [1024, 1025, 1026, 4097] {
            let cut = fit(&text, text.len() as u64, limit);
            assert!(cut.len() <= limit, "{} > {limit}", cut.len());
            assert!(!cut.contains('\u{fffd}'));
            assert_eq!(cut.lines().filter(|line| line.contains("bytes left out")).count(), 1);
        }
    }

    #[test]
    fn characters_that_the_capture_cut_are_dropped_whole() {
        let captured = captured(11, &["ä".repeat(50).as_bytes()]);
        assert!(!captured.text().contains('\u{fffd}'), "{}", captured.text());
        assert!(captured.exact_bytes().is_none());
    }
}
