//! TLS towards clients: which certificate a name gets, and whose certificates are taken.

use std::collections::HashMap;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{Ticketer, default_provider};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};

use crate::config::{Certificate, ClientAuth, ListenerTls, TlsVersion};

/// What is offered to clients, the best first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What a listener speaks TLS with.
///
/// # Errors
/// When a certificate cannot be used; validation has tried them all.
pub(super) fn server_config(tls: &ListenerTls) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = Arc::new(default_provider());
    let versions: &[&SupportedProtocolVersion] = match tls.min_version {
        TlsVersion::Tls12 => &[&TLS13, &TLS12],
        TlsVersion::Tls13 => &[&TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)?;
    let builder = match verifier(&tls.client_auth, &provider)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let certificates = Certificates::new(&tls.certificates, &provider)?;
    let mut config = builder.with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = PROTOCOLS.iter().map(|protocol| protocol.to_vec()).collect();
    config.ticketer = Ticketer::new()?;
    Ok(Arc::new(config))
}

fn verifier(
    auth: &ClientAuth,
    provider: &Arc<CryptoProvider>,
) -> Result<Option<Arc<dyn ClientCertVerifier>>, rustls::Error> {
    let (ClientAuth::Optional(ca) | ClientAuth::Required(ca)) = auth else { return Ok(None) };
    let mut roots = RootCertStore::empty();
    for der in ca {
        roots.add(CertificateDer::from(der.clone()))?;
    }
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
    let builder = match auth {
        ClientAuth::Optional(_) => builder.allow_unauthenticated(),
        _ => builder,
    };
    let verifier = builder.build().map_err(|error| rustls::Error::General(error.to_string()))?;
    Ok(Some(verifier))
}

/// The certificates by the names that they are for.
#[derive(Debug)]
struct Certificates {
    first: Arc<CertifiedKey>,
    by_name: HashMap<String, Arc<CertifiedKey>>,
}

impl Certificates {
    fn new(written: &[Certificate], provider: &CryptoProvider) -> Result<Self, rustls::Error> {
        let mut first = None;
        let mut by_name = HashMap::new();
        for certificate in written {
            let chain = certificate.chain.iter().cloned().map(CertificateDer::from).collect();
            let key = PrivateKeyDer::try_from(certificate.key.expose().to_vec());
            let key = key.map_err(|error| rustls::Error::General(error.to_owned()))?;
            let certified = Arc::new(CertifiedKey::from_der(chain, key, provider)?);
            for name in &certificate.names {
                by_name.entry(name.clone()).or_insert_with(|| Arc::clone(&certified));
            }
            first.get_or_insert(certified);
        }
        let first = first.ok_or(rustls::Error::NoCertificatesPresented)?;
        Ok(Self { first, by_name })
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let wanted = hello.server_name().map(str::to_ascii_lowercase);
        let by_name = wanted.and_then(|name| {
            // A wildcard stands for one label (RFC 6125, section 6.4.3).
            let wildcard = || Some(format!("*{}", &name[name.find('.')?..]));
            self.by_name.get(&name).or_else(|| self.by_name.get(&wildcard()?))
        });
        Some(Arc::clone(by_name.unwrap_or(&self.first)))
    }
}
