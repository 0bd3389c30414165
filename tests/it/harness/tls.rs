//! Certificates of our own, and TLS in front of an upstream.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// An authority that signs whatever it is asked for.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "an authority of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for names and addresses.
    pub(crate) fn sign(&self, names: &[&str]) -> Pair {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "a certificate of a test");
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        Pair { cert, key: key.serialize_pem() }
    }

    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// Writes its certificate to a file.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let file = folder.join("ca.pem");
        std::fs::write(&file, &self.pem).unwrap();
        file
    }
}

impl Pair {
    /// Writes both to files, `NAME.pem` and `NAME.key`.
    pub(crate) fn write(&self, folder: &Path, name: &str) {
        std::fs::write(folder.join(format!("{name}.key")), &self.key).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), &self.cert).unwrap();
    }

    fn server_config(&self, client_ca: Option<&Authority>, alpn: &[&str]) -> ServerConfig {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = match client_ca {
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
                ServerConfig::builder().with_client_cert_verifier(verifier)
            }
            None => ServerConfig::builder().with_no_client_auth(),
        };
        let chain = vec![CertificateDer::from_pem_slice(self.cert.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }
}

/// Takes TLS off connections and hands them to a plain upstream.
pub(crate) struct TlsFront {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    _runtime: Runtime,
}

impl TlsFront {
    /// One with a certificate, which agrees on one of `alpn`; with `client_ca`, clients have to show
    /// a certificate of that authority.
    pub(crate) fn start(
        pair: &Pair,
        client_ca: Option<&Authority>,
        alpn: &[&str],
        to: SocketAddr,
    ) -> Self {
        Self::begin(Arc::new(pair.server_config(client_ca, alpn)), to, true)
    }

    /// One that closes as many servers do: without saying so in TLS.
    pub(crate) fn abrupt(pair: &Pair, to: SocketAddr) -> Self {
        Self::begin(Arc::new(pair.server_config(None, &[])), to, false)
    }

    fn begin(config: Arc<ServerConfig>, to: SocketAddr, says_goodbye: bool) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                let counted = Arc::clone(&counted);
                tokio::spawn(async move {
                    let Ok(mut outer) = acceptor.accept(stream).await else { return };
                    counted.fetch_add(1, Ordering::SeqCst);
                    let Ok(mut inner) = TcpStream::connect(to).await else { return };
                    if says_goodbye {
                        let _ = tokio::io::copy_bidirectional(&mut outer, &mut inner).await;
                        return;
                    }
                    let (mut from_client, mut to_client) = tokio::io::split(outer);
                    let (mut from_server, mut to_server) = inner.split();
                    let _ = tokio::select! {
                        end = tokio::io::copy(&mut from_client, &mut to_server) => end,
                        end = tokio::io::copy(&mut from_server, &mut to_client) => end,
                    };
                });
            }
        });
        Self { address, connections, _runtime: runtime }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections whose handshake was done.
    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}
