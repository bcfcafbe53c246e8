//! What an operator can set: by system credentials, which survive a reboot, or by the unit's environment.

use std::io;

use pandastack_daemon::Context;

use crate::hosts::{self, Mode};

/// Plain HTTP, when `PANDASTACK_EDGE_LISTEN` says nothing else.
const HTTP: &str = "[::]:8081";
const HTTPS: &str = "[::]:8443";

const CERTIFICATE: &str = "pandastack.edge_certificate";

/// The settings.
#[derive(Clone)]
pub struct Config {
    /// Address of plain HTTP.
    pub http: String,
    /// Address of HTTPS; empty (set as `none`): none.
    pub https: String,
    /// Suffix of host names; empty: there are none.
    pub suffix: String,
    /// Which ports they open.
    pub mode: Mode,
    /// Where previews are served, as clients see it; empty: as api sees it.
    pub base_url: String,
    /// Certificate chain and key, PEM; without it one is made.
    pub certificate: Option<Vec<u8>>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the key.
        f.debug_struct("Config").field("http", &self.http).field("https", &self.https).finish_non_exhaustive()
    }
}

impl Config {
    /// Reads it. What makes no sense is told and left out, on the safe side.
    pub fn read(context: &Context) -> io::Result<Self> {
        let set = |name: &str| -> io::Result<String> {
            let credential = context.credential(&format!("pandastack.{name}"))?;
            let variable = format!("PANDASTACK_{}", name.to_uppercase());
            let text = match credential {
                Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                None => std::env::var(variable).unwrap_or_default(),
            };
            Ok(text.trim().to_owned())
        };
        let https = std::env::var("PANDASTACK_EDGE_LISTEN_TLS").unwrap_or_default();
        let or = |text: String, default: &str| if text.is_empty() { default.to_owned() } else { text };
        Ok(Self {
            http: or(std::env::var("PANDASTACK_EDGE_LISTEN").unwrap_or_default(), HTTP),
            https: if https == "none" { String::new() } else { or(https, HTTPS) },
            suffix: suffix(&set("preview_suffix")?),
            mode: mode(&set("preview_ports")?),
            base_url: base_url(set("preview_url")?),
            certificate: context.credential(CERTIFICATE)?,
        })
    }
}

fn suffix(text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    hosts::suffix(text).unwrap_or_else(|| {
        tracing::error!("preview_suffix is no domain name; there are no previews by host name");
        String::new()
    })
}

fn mode(text: &str) -> Mode {
    match text {
        "" | "open" => Mode::Open,
        "named" => Mode::Named,
        _ => {
            tracing::error!("preview_ports is neither `open` nor `named`; taken for `named`");
            Mode::Named
        }
    }
}

fn base_url(text: String) -> String {
    let good = text.is_empty() || ["http://", "https://"].iter().any(|scheme| text.starts_with(scheme));
    if !good {
        tracing::error!("preview_url is no address of http or https; ignored");
        return String::new();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_opens_nothing() {
        assert_eq!(
            (suffix(""), suffix("a b"), suffix(".P.test")),
            (String::new(), String::new(), "p.test".into())
        );
        assert_eq!(
            (mode(""), mode("open"), mode("named"), mode("Open")),
            (Mode::Open, Mode::Open, Mode::Named, Mode::Named)
        );
        assert_eq!((base_url("https://p".into()), base_url("p".into())), ("https://p".into(), String::new()));
    }
}
