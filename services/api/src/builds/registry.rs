//! Which registries images may come from, and what a reference to an image is. Pure.
//!
//! Owns: the form of both. Refuses to know how an image is fetched.

/// Longest reference, bytes.
const LIMIT: usize = 512;

/// A registry that an operator allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// `host` or `host:port`, lower case.
    pub host: String,
    /// Plain HTTP, or a certificate that nobody vouches for.
    pub insecure: bool,
}

/// A reference to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `host` or `host:port` of its registry, lower case.
    pub host: String,
    /// All of it, with the registry.
    pub text: String,
}

/// The registries of a list: entries between commas or on lines of their own, each `host[:port]` with `insecure` behind it or
/// not. What is no entry is told and left out.
pub fn allowed(list: &str) -> Vec<Registry> {
    let entry = |text: &str| {
        let mut words = text.split_whitespace();
        let host = words.next()?.to_ascii_lowercase();
        let insecure = match (words.next(), words.next()) {
            (None, _) => Some(false),
            (Some("insecure"), None) => Some(true),
            _ => None,
        };
        match insecure.filter(|_| is_host(&host)) {
            Some(insecure) => Some(Registry { host, insecure }),
            None => {
                tracing::error!("the list of registries has an entry that is none: {text:?}; left out");
                None
            }
        }
    };
    list.split([',', '\n']).filter_map(entry).collect()
}

/// Takes a reference apart.
///
/// # Errors
/// One sentence on what is wrong.
pub fn reference(text: &str) -> Result<Reference, String> {
    let wrong = || {
        "`image_ref` is not a reference to an image: registry/repository[:tag][@digest] is expected"
            .to_owned()
    };
    if text.is_empty() || text.len() > LIMIT {
        return Err(wrong());
    }
    let (host, rest) = match text.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            (first.to_ascii_lowercase(), rest.to_owned())
        }
        Some(_) => ("docker.io".to_owned(), text.to_owned()),
        None => ("docker.io".to_owned(), format!("library/{text}")),
    };
    let (named, digest) = match rest.split_once('@') {
        Some((named, digest)) => (named, Some(digest)),
        None => (rest.as_str(), None),
    };
    let (repository, tag) = match named.rsplit_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (named, None),
    };
    let part = |part: &str| {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        part.bytes().all(good) && part.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
    };
    let is_tag = |tag: &str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        (1..=128).contains(&tag.len()) && tag.bytes().all(good) && !tag.starts_with(['.', '-'])
    };
    let is_digest = |digest: &str| {
        digest.strip_prefix("sha256:").is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
    };
    let good = is_host(&host)
        && repository.split('/').all(part)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(is_digest);
    if good { Ok(Reference { text: format!("{host}/{rest}"), host }) } else { Err(wrong()) }
}

fn is_host(text: &str) -> bool {
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let label = |label: &str| {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(good) && !label.starts_with('-')
    };
    let digits = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    name.len() <= 253
        && name.split('.').all(label)
        && port.is_none_or(|port| digits(port) && port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_list_has_hosts_and_marks() {
        let entry = |host: &str, insecure| Registry { host: host.into(), insecure };
        assert_eq!(allowed(""), []);
        assert_eq!(
            allowed("Registry.Example.com, 10.0.0.5:5000 insecure\nlocalhost:5000\n\n"),
            [
                entry("registry.example.com", false),
                entry("10.0.0.5:5000", true),
                entry("localhost:5000", false)
            ]
        );
        assert_eq!(allowed("a b, https://x, a/b, x:0, x:99999, -a, .., x insecure insecure, *"), []);
    }

    #[test]
    fn a_reference_names_its_registry() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, host, whole) in [
            ("r.test/a/b:1", "r.test", "r.test/a/b:1"),
            ("R.test:5000/a", "r.test:5000", "r.test:5000/a"),
            ("localhost/a", "localhost", "localhost/a"),
            ("debian", "docker.io", "docker.io/library/debian"),
            ("user/app:v1", "docker.io", "docker.io/user/app:v1"),
            (&format!("r.test/a:1@{digest}"), "r.test", &format!("r.test/a:1@{digest}")),
        ] {
            let expected = Reference { host: host.into(), text: whole.into() };
            assert_eq!(reference(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "r.test/",
            "r.test/A",
            "r.test/../x",
            "r.test//x",
            "r.test/a b",
            "r.test/a:",
            "r.test/a:.x",
            "r.test/a@sha256:1",
            "r.test:0/a",
            "http://r.test/a",
            "r.test/a\n",
            "r_x.test/a",
            &"a".repeat(600),
        ] {
            assert!(reference(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_is_plain(text in "\\PC{0,60}", prefix in prop::sample::select(vec!["", "r.test/", "r.test:5/a"])) {
            let _ = allowed(&text);
            if let Ok(found) = reference(&format!("{prefix}{text}")) {
                let host = format!("{}/", found.host);
                prop_assert!(found.text.starts_with(&host));
                prop_assert!(found.text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/@".contains(&byte)));
                prop_assert!(!found.text.contains(".."), "{}", found.text);
            }
        }
    }
}
