//! Polling with a deadline: a test waits for an event, never for a length of time.

use std::time::{Duration, Instant};

/// How often a condition is looked at. Small against every bound that the tests assert.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Polls until `look` yields a value; panics with `what` when `limit` has passed.
#[track_caller]
pub fn for_value<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Polls until `condition` holds; panics with `what` when `limit` has passed.
#[track_caller]
pub fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    for_value(what, limit, || condition().then_some(()));
}

/// Watches that `condition` holds for the whole of `span`: the only way to show that something does not happen.
#[track_caller]
pub fn holds_for(what: &str, span: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while start.elapsed() < span {
        assert!(condition(), "no longer true after {:?}: {what}", start.elapsed());
        std::thread::sleep(POLL_INTERVAL);
    }
}
