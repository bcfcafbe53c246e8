//! The conductor over a world of fakes: what is promised holds, whatever breaks.

#![allow(clippy::unwrap_used)]

mod copies;
mod crash;
mod daemon;
mod fake_storage;
mod fakes;
mod full;
mod observe;
mod quotas;
mod sandboxes;
mod sleep;
mod slots;
mod templates;
mod volume_snapshots;
