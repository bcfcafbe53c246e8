//! TLS: the certificate, and what is spoken.
//!
//! Owns: the operator's certificate from a credential, or one of our own making that nobody trusts by itself, kept with its key in
//! one file of the state directory. Refuses to know: sockets.

use std::{io, path::Path, sync::Arc};

use pandastack_daemon::files;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
    },
};

const FILE: &str = "tls.pem";
const FILE_LIMIT: u64 = 64 << 10;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or without a certificate or a key.
    #[error("the certificate and its key are not in PEM form")]
    Pem(#[from] pem::Error),
    /// They do not fit together, or are of a kind that is not supported.
    #[error("the certificate cannot be used")]
    Unusable(#[from] rustls::Error),
    /// None could be made.
    #[error("no certificate could be made")]
    Made(#[from] rcgen::Error),
    /// The file of our own one.
    #[error("the file of the certificate")]
    File(#[from] io::Error),
}

/// What accepts TLS, with the operator's certificate (PEM: the chain and its key), or one of our own for these names. Blocking.
pub fn acceptor(given: Option<&[u8]>, state: &Path, suffix: &str) -> Result<TlsAcceptor, TlsError> {
    let own;
    let pem = match given {
        Some(pem) => pem,
        None => {
            own = own_certificate(&state.join(FILE), suffix)?;
            own.as_slice()
        }
    };
    let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(pem)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Our own certificate, made when there is none for these names.
fn own_certificate(path: &Path, suffix: &str) -> Result<Vec<u8>, TlsError> {
    let mut names = vec!["localhost".to_owned()];
    if !suffix.is_empty() {
        names.extend([suffix.to_owned(), format!("*.{suffix}")]);
    }
    // Text before the first block is no part of PEM.
    let mark = format!("{}\n", names.join(" "));
    if let Some(kept) = files::read_limited(path, FILE_LIMIT)?
        && kept.starts_with(mark.as_bytes())
    {
        return Ok(kept);
    }
    let made = rcgen::generate_simple_self_signed(names)?;
    let pem = format!("{mark}{}{}", made.cert.pem(), made.signing_key.serialize_pem()).into_bytes();
    files::write_atomic(path, &pem, 0o600)?;
    tracing::info!("a certificate of our own was made; nobody trusts it by itself");
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn our_own_certificate_is_kept_while_its_names_are_right() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().join(FILE);
        acceptor(None, state.path(), "").unwrap();
        let first = std::fs::read(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        acceptor(None, state.path(), "").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        acceptor(None, state.path(), "preview.test").unwrap();
        let second = std::fs::read(&path).unwrap();
        assert_ne!(second, first);
        assert!(acceptor(Some(&second), state.path(), "").is_ok(), "an operator's is taken as it is");
        assert_eq!(std::fs::read(&path).unwrap(), second);
    }

    #[test]
    fn what_is_no_certificate_is_an_error() {
        let state = tempfile::tempdir().unwrap();
        for bad in ["", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(acceptor(Some(bad.as_bytes()), state.path(), "").is_err(), "{bad:?}");
        }
        assert!(!state.path().join(FILE).exists());
    }
}
