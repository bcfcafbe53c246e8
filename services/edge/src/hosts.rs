//! Host names of previews: `{port}-{sandbox}.{suffix}`. Pure.
//!
//! The published clients make these names by themselves, from the address of the API: nothing is asked before one is used. The
//! sandbox's id, 103 random bits, is what opens it. So there are none until the operator names a suffix.

use pandastack_bus::SandboxId;

/// Which ports a host name opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every port: what the published clients promise their users.
    Open,
    /// Those that the sandbox's owner has named (`POST /v1/sandboxes/{id}/ports`).
    Named,
}

/// What a `Host` means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A port of a sandbox.
    Preview(SandboxId, u16),
    /// Below the suffix, and no preview.
    Unknown,
    /// Any other name of ours.
    Other,
}

/// What a `Host` means where previews have this suffix (lower case, without dots at its ends); empty: none.
pub fn parse(host: &str, suffix: &str) -> Host {
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if is_number(port) { name } else { host });
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if suffix.is_empty() {
        return Host::Other;
    }
    let Some(label) = name.strip_suffix(suffix).and_then(|rest| rest.strip_suffix('.')) else {
        return Host::Other;
    };
    match preview(label) {
        Some((sandbox, port)) => Host::Preview(sandbox, port),
        None => Host::Unknown,
    }
}

/// `^([0-9]{1,5})-([a-z0-9]…)$`, the second part an id of ours.
fn preview(label: &str) -> Option<(SandboxId, u16)> {
    let (port, sandbox) = label.split_once('-')?;
    if !(1..=5).contains(&port.len()) || !is_number(port) {
        return None;
    }
    let port = port.parse().ok().filter(|port| *port != 0 && *port != 22)?;
    Some((sandbox.parse().ok()?, port))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// A suffix as an operator may write it; `None` when it is no domain name.
pub fn suffix(text: &str) -> Option<String> {
    let suffix = text.trim().trim_matches('.').to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    (suffix.len() <= 200 && suffix.split('.').all(label)).then_some(suffix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "abcdefghij0123456789";

    #[test]
    fn previews_are_one_label_below_the_suffix() {
        let meant = |host: &str| parse(host, "preview.test");
        let found = |port| Host::Preview(ID.parse().unwrap(), port);
        for (host, host_is) in [
            (format!("3000-{ID}.preview.test"), found(3000)),
            (format!("3000-{}.PREVIEW.test:8443", ID.to_uppercase()), found(3000)),
            (format!("00080-{ID}.preview.test."), found(80)),
            (format!("65535-{ID}.preview.test"), found(65535)),
            (format!("65536-{ID}.preview.test"), Host::Unknown),
            (format!("0-{ID}.preview.test"), Host::Unknown),
            (format!("22-{ID}.preview.test"), Host::Unknown),
            (format!("000080-{ID}.preview.test"), Host::Unknown),
            (format!("+80-{ID}.preview.test"), Host::Unknown),
            (format!("x.3000-{ID}.preview.test"), Host::Unknown),
            (format!("3000-{ID}x.preview.test"), Host::Unknown),
            (format!("3000{ID}.preview.test"), Host::Unknown),
            (format!("3000-{ID}.evil.test"), Host::Other),
            (format!("3000-{ID}.xpreview.test"), Host::Other),
            (format!("3000-{ID}preview.test"), Host::Other),
            ("preview.test".to_owned(), Host::Other),
            (String::new(), Host::Other),
            ("[::1]:8081".to_owned(), Host::Other),
        ] {
            assert_eq!(meant(&host), host_is, "{host}");
        }
        assert_eq!(parse(&format!("3000-{ID}.preview.test"), ""), Host::Other);
    }

    #[test]
    fn a_suffix_is_a_domain_name() {
        assert_eq!(suffix(" .Preview.Example.com.\n").as_deref(), Some("preview.example.com"));
        for bad in ["", ".", "a..b", "-a.b", "a b", "*.a", "a/b", &"x".repeat(64)] {
            assert_eq!(suffix(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_host_panics(host in any::<String>(), other in "[0-9]{0,6}-?[a-z0-9]{19,21}\\.preview\\.test(:[0-9]{0,6})?") {
            let _ = parse(&host, "preview.test");
            if let Host::Preview(id, port) = parse(&other, "preview.test") {
                let (digits, rest) = other.split_once('-').unwrap();
                prop_assert_eq!(digits.parse::<u16>().unwrap(), port);
                prop_assert!(rest.starts_with(id.as_str()));
            }
        }
    }
}
