//! The HTTP API that the published SDKs talk to.
//!
//! Owns: tenancy (workspaces, tokens), HTTP, the conversations with guests on streams that vmm hands out.
//! Refuses to know: any machine. What lives, dies or is stored is vmm's and storage's.
//!
//! ```text
//!   listener ──► gate ──► routes ──► vmm, storage (D-Bus: decisions)
//!   (sockets)   (id, token,  └─────► guest ──► agent (a stream from vmm: bytes)
//!                limit, log)        builds: templates of workspaces, made one at a time in a machine of their own
//!                                   mcp: what a model's tool call is, the same routes behind it
//! ```

pub mod app;
pub mod audit;
pub mod auth;
pub mod builds;
pub mod bus;
pub mod catalogue;
pub mod fresh;
pub mod gate;
pub mod guest;
pub mod happenings;
pub mod input;
pub mod limit;
pub mod lines;
pub mod listener;
pub mod mcp;
pub mod metrics;
pub mod openapi;
pub mod operator;
pub mod output;
pub mod problem;
pub mod routes;
pub mod scope;
pub mod start;
pub mod table;
pub mod tenancy;
pub mod tenant;
pub mod wire;
