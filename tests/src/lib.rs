//! Support for the black-box tests of `sandbox-agent`.
//!
//! The tests start the shipped binary and know what anyone outside knows: HTTP, files, signals and exit codes.
//! Nothing here imports the agent or the isolation crate.
//!
//! - [`agent`]: one running agent with folders of its own, and [`binary`](agent::binary), the program under test.
//! - [`submission`]: the body of `POST /execute`.
//! - [`http`]: a client that can also say nonsense, and the reader that the mock shares with it.
//! - [`control_plane`]: the strict mock of the control plane, with faults to inject.
//! - [`processes`]: what `/proc` tells about processes that should be gone.
//! - [`requirements`]: what a test needs of the machine; a missing need is said aloud, and fails in CI.
//! - [`wait`]: polling with a deadline, in place of sleeping.

pub mod agent;
pub mod control_plane;
pub mod http;
pub mod processes;
pub mod requirements;
pub mod submission;
pub mod wait;

pub use agent::{Agent, AgentBuilder};
pub use control_plane::{ControlPlane, Fault, Faults};
pub use requirements::{require_root, require_sandbox};
pub use submission::Submission;
pub use wait::{for_value, until};
