//! Certificates and keys: read, checked, and told apart by the names in them.

use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use super::super::file::{FileBackendTls, FileClientAuth, FileTls};
use super::super::problem::{KeyPath, Problems};
use super::super::seen::SeenFile;
use super::super::snapshot::{
    BackendTls, BackendUrl, Certificate, ClientAuth, Host, ListenerTls, TlsVersion,
};
use super::Files;
use crate::secret::SecretBytes;

/// Largest file of certificates: the roots of a whole system take a quarter of it.
const PEM_BYTES_MAX: u64 = 1024 * 1024;

/// The listeners' side.
pub(super) fn listener(
    file: Option<&FileTls>,
    files: &Files,
    problems: &mut Problems,
) -> Option<ListenerTls> {
    let file = file?;
    let path = KeyPath::default().key("tls");
    let mut certificates = Vec::new();
    for (index, written) in file.certificates.iter().flatten().enumerate() {
        let at = path.key("certificates").index(index);
        let Some(written) = written else { continue };
        let pair = (written.cert_file.as_deref(), written.key_file.as_deref());
        certificates.extend(certificate(pair, &at, files, problems));
    }
    if file.certificates.as_ref().is_none_or(Vec::is_empty) && !problems.has_below(&path) {
        problems.value(&path, "needs at least one entry under \"certificates\"");
    }
    let at = path.key("client_ca_file");
    let ca = file.client_ca_file.as_deref();
    let ca = ca.and_then(|name| authorities(name, &at, files, problems));
    let client_auth = match (file.client_certificates, ca) {
        (Some(FileClientAuth::Off), _) => ClientAuth::Off,
        (Some(_), None) if file.client_ca_file.is_none() => {
            problems.value(
                &path.key("client_certificates"),
                "needs client_ca_file, which says whose certificates are taken",
            );
            ClientAuth::Off
        }
        (_, None) => ClientAuth::Off,
        (Some(FileClientAuth::Optional), Some(ca)) => ClientAuth::Optional(ca),
        (Some(FileClientAuth::Required) | None, Some(ca)) => ClientAuth::Required(ca),
    };
    let min_version = file.min_version.map_or(TlsVersion::Tls12, |version| version.0);
    Some(ListenerTls { certificates, client_auth, min_version })
}

/// A backend's side; none where it has no TLS.
pub(super) fn backend(
    file: Option<&FileBackendTls>,
    url: &BackendUrl,
    at: &KeyPath,
    files: &Files,
    problems: &mut Problems,
) -> BackendTls {
    let none = FileBackendTls::default();
    let file = file.unwrap_or(&none);
    let own_name = match &url.host {
        Host::Name(name) => name.clone(),
        Host::Address(address) => address.to_string(),
        Host::Unix(_) => String::new(),
    };
    let server_name = file.server_name.clone().unwrap_or(own_name);
    if url.tls && ServerName::try_from(server_name.as_str()).is_err() {
        problems.value(
            &at.key("server_name"),
            "expected the name or address that the backend's certificate is for",
        );
    }
    let ca = file.ca_file.as_deref();
    let ca = ca.and_then(|name| authorities(name, &at.key("ca_file"), files, problems));
    let client = if file.cert_file.is_some() || file.key_file.is_some() {
        certificate((file.cert_file.as_deref(), file.key_file.as_deref()), at, files, problems)
    } else {
        None
    };
    let verify = file.verify.unwrap_or(true);
    if !verify && ca.is_some() {
        problems.value(&at.key("ca_file"), "has no use while verify is false; keep one of the two");
    }
    BackendTls { ca, client, server_name, verify }
}

/// A certificate with its chain and key.
fn certificate(
    (cert_file, key_file): (Option<&str>, Option<&str>),
    at: &KeyPath,
    files: &Files,
    problems: &mut Problems,
) -> Option<Certificate> {
    let (cert_at, key_at) = (at.key("cert_file"), at.key("key_file"));
    let mut missing = |at: &KeyPath, file: Option<&str>| {
        if file.is_none() && !problems.has(at) {
            problems.value(at, "is missing; a certificate takes cert_file and key_file");
        }
    };
    missing(&cert_at, cert_file);
    missing(&key_at, key_file);
    let chain = certificates(cert_file?, &cert_at, files, problems);
    let key = read(key_file?, &key_at, files, problems).and_then(|pem| {
        let key = PrivateKeyDer::from_pem_slice(&pem);
        let told = "no private key in it; it may not have a passphrase";
        key.map_err(|_| problems.value(&key_at, told)).ok()
    });
    let (chain, key) = (chain?, key?);
    let (_, leaf) = X509Certificate::from_der(&chain[0])
        .map_err(|_| problems.value(&cert_at, "the certificate cannot be read"))
        .ok()?;
    if leaf.version() != X509Version::V3 {
        problems.value(&cert_at, "is no X.509 v3 certificate; make one with a subjectAltName");
        return None;
    }
    let checked = CertifiedKey::from_der(chain.clone(), key.clone_key(), &default_provider());
    if let Err(error) = checked {
        let message = match error {
            rustls::Error::InconsistentKeys(_) => "is not the key of this certificate".to_owned(),
            error => format!("cannot be used: {error}"),
        };
        problems.value(&key_at, message);
        return None;
    }
    let (names, not_after) = (names(&leaf), leaf.validity().not_after.timestamp());
    Some(Certificate {
        chain: chain.iter().map(|der| der.to_vec()).collect(),
        key: SecretBytes::new(key.secret_der().to_vec()),
        names,
        not_after,
    })
}

/// The host names that a certificate is for, in lower case.
fn names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let names = leaf.subject_alternative_name().ok().flatten();
    let names = names.into_iter().flat_map(|names| &names.value.general_names);
    names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect()
}

/// Certificates of authorities.
fn authorities(
    name: &str,
    at: &KeyPath,
    files: &Files,
    problems: &mut Problems,
) -> Option<Vec<Vec<u8>>> {
    let certificates = certificates(name, at, files, problems)?;
    let mut store = RootCertStore::empty();
    for certificate in &certificates {
        if let Err(error) = store.add(certificate.clone()) {
            problems.value(at, format!("a certificate in it cannot be used: {error}"));
            return None;
        }
    }
    Some(certificates.iter().map(|der| der.to_vec()).collect())
}

fn certificates(
    name: &str,
    at: &KeyPath,
    files: &Files,
    problems: &mut Problems,
) -> Option<Vec<CertificateDer<'static>>> {
    let pem = read(name, at, files, problems)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Some(certificates),
        _ => {
            problems.value(at, "no certificate in PEM form in it");
            None
        }
    }
}

fn read(name: &str, at: &KeyPath, files: &Files, problems: &mut Problems) -> Option<Vec<u8>> {
    use std::io::Read;
    let path = files.folder.join(name);
    files.read.borrow_mut().push(SeenFile::look(&path));
    let mut bytes = Vec::new();
    let read = std::fs::File::open(&path)
        .and_then(|file| file.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Ok(read) if read as u64 <= PEM_BYTES_MAX => Some(bytes),
        Ok(_) => {
            problems.value(at, "too large for certificates");
            None
        }
        Err(error) => {
            problems.value(at, format!("cannot read {}: {error}", path.display()));
            None
        }
    }
}
