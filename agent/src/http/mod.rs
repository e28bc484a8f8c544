//! The edge: connections, authorization, sizes, and JSON to types.

pub mod answer;
pub mod routes;
pub mod server;
pub mod wire;
