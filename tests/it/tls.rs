//! TLS towards clients and backends, with certificates of our own.

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::{
    Authority, Gateway, PATIENCE, Pair, TlsFront, Upstream, eventually, run_program, send,
};

/// curl with options; its output and, of what it says, the first line that tells an error.
fn curl(arguments: &[&str]) -> (String, String) {
    let output = Command::new("curl").args(["-sS", "--max-time", "20"]).args(arguments).output();
    let output = output.expect("curl runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// A gateway that speaks TLS with the certificates of a folder.
fn gateway(folder: tempfile::TempDir, certificates: &[&str], more: &str, url: &str) -> Gateway {
    let list: Vec<String> = certificates
        .iter()
        .map(|name| format!("{{cert_file: {name}.pem, key_file: {name}.key}}"))
        .collect();
    let text = format!(
        "listen: [127.0.0.1:0, \"https://127.0.0.1:0\"]\n\
         tls: {{certificates: [{}]{more}}}\n\
         services: {{svc: {{models: {{mdl: {{backends: [{{id: a, url: \"{url}\"}}]}}}}}}}}\n",
        list.join(", ")
    );
    std::fs::write(folder.path().join("tollgate.yaml"), text).unwrap();
    Gateway::start_in(folder, &[], &["serve"])
}

/// Arguments for curl: the URL of a name at the gateway, and whom to believe.
struct Target {
    url: String,
    resolve: String,
    ca: String,
}

impl Target {
    fn of(gateway: &Gateway, name: &str, ca: &Path) -> Self {
        let address = gateway.wait_listens("https");
        Self {
            url: format!("https://{name}:{}/svc/mdl/x", address.port()),
            resolve: format!("{name}:{}:{}", address.port(), address.ip()),
            ca: ca.to_string_lossy().into_owned(),
        }
    }

    fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["--cacert", &self.ca, "--resolve", &self.resolve, &self.url], more].concat()
    }
}

#[test]
fn clients_speak_tls_in_both_versions_and_http_in_both() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.header("x-forwarded-proto")));
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(folder.path());
    authority.sign(&["gate.example"]).write(folder.path(), "one");
    let gateway = gateway(folder, &["one"], "", &upstream.url());
    let target = Target::of(&gateway, "gate.example", &ca);
    let format = "\n%{http_version} %{ssl_verify_result}";
    for (options, shown) in [
        (&["--http1.1", "--tls-max", "1.2"][..], "https\n1.1 0"),
        (&["--http1.1", "--tlsv1.3"], "https\n1.1 0"),
        (&["--http2", "--tlsv1.3"], "https\n2 0"),
        (&["--http2", "--tls-max", "1.2"], "https\n2 0"),
        (&["--http2", "--data", "x"], "https\n2 0"),
    ] {
        let (out, err) = curl(&target.arguments(&[options, &["-w", format]].concat()));
        assert_eq!(out, shown, "{options:?}: {err}");
    }
    let (_, err) = curl(&target.arguments(&["--tls-max", "1.1"]));
    assert!(err.contains("alert"), "{err}");
    let plain = format!("http://{}/svc/mdl/x", gateway.address());
    assert_eq!(curl(&[&plain]).0, "http");
}

#[test]
fn who_speaks_the_wrong_scheme_is_told_so() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    Authority::new().sign(&["localhost"]).write(folder.path(), "one");
    let gateway = gateway(folder, &["one"], "", &upstream.url());
    let secure = gateway.wait_listens("https");
    let answer = send(secure, "GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n");
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("wrong_scheme"))
    );
    assert!(answer.text().contains("change the URL's http to https"), "{}", answer.text());
    let (_, err) = curl(&["--http2-prior-knowledge", &format!("http://{secure}/svc/mdl/x")]);
    assert!(!err.is_empty());
    let (_, err) = curl(&["-k", &format!("https://{}/svc/mdl/x", gateway.address())]);
    assert!(err.contains("wrong version number"), "{err}");
    let hello = [22, 3, 1, 0, 100, 1, 0, 0];
    let answer = send(gateway.address(), hello);
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].as_str()),
        (400, Some("wrong_scheme"))
    );
    assert!(upstream.seen().is_empty());
}

#[test]
fn a_client_gets_the_certificate_of_the_name_that_it_asks_for() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(folder.path());
    authority.sign(&["first.example"]).write(folder.path(), "first");
    authority.sign(&["*.wild.example", "Second.Example"]).write(folder.path(), "second");
    let gateway = gateway(folder, &["first", "second"], "", &upstream.url());
    for (name, is_known) in [
        ("first.example", true),
        ("second.example", true),
        ("a.wild.example", true),
        ("a.b.wild.example", false),
        ("other.example", false),
    ] {
        let target = Target::of(&gateway, name, &ca);
        let (out, err) = curl(&target.arguments(&[]));
        assert_eq!(out == "x", is_known, "{name}: {err}");
    }
}

#[test]
fn clients_show_certificates_where_they_have_to() {
    let upstream = Upstream::named("x");
    let (authority, others) = (Authority::new(), Authority::new());
    for (more, without, with_wrong) in [
        (", client_ca_file: ca.pem", false, false),
        (", client_ca_file: ca.pem, client_certificates: optional", true, false),
        (", client_ca_file: ca.pem, client_certificates: off", true, true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let ca = authority.write(folder.path());
        authority.sign(&["gate.example"]).write(folder.path(), "one");
        authority.sign(&["client"]).write(folder.path(), "client");
        others.sign(&["client"]).write(folder.path(), "wrong");
        let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        let (cert, key) = (path("client.pem"), path("client.key"));
        let (wrong_cert, wrong_key) = (path("wrong.pem"), path("wrong.key"));
        let gateway = gateway(folder, &["one"], more, &upstream.url());
        let target = Target::of(&gateway, "gate.example", &ca);
        assert_eq!(curl(&target.arguments(&["--cert", &cert, "--key", &key])).0, "x", "{more}");
        assert_eq!(curl(&target.arguments(&[])).0 == "x", without, "{more}");
        let wrong = curl(&target.arguments(&["--cert", &wrong_cert, "--key", &wrong_key]));
        assert_eq!(wrong.0 == "x", with_wrong, "{more}: {}", wrong.1);
    }
}

#[test]
fn new_certificates_are_taken_up_without_a_failed_handshake() {
    let upstream = Upstream::named("x");
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(folder.path());
    let sign = || authority.sign(&["gate.example"]);
    sign().write(folder.path(), "one");
    let gateway = gateway(folder, &["one"], "", &upstream.url());
    let target = Target::of(&gateway, "gate.example", &ca);
    let reloads = |word: &str| gateway.log().iter().filter(|line| line.contains(word)).count();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut done, mut failed) = (0, Vec::new());
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            let (mut done, mut failed) = (0, Vec::new());
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let (out, err) = curl(&target.arguments(&[]));
                done += 1;
                if out != "x" && failed.len() < 3 {
                    failed.push(err);
                }
            }
            (done, failed)
        });
        for round in 1..=4 {
            // Certificate and key do not change at once: what does not belong together is not used.
            sign().write(gateway.folder(), "one");
            eventually("it is taken up", || reloads("the new configuration is at work") >= round);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (done, failed) = client.join().unwrap();
    });
    assert!(failed.is_empty(), "{failed:?}");
    assert!(done > 20, "{done}");
    println!("{done} handshakes while certificates changed 4 times");
    // A broken pair is told of, and the old one stays.
    std::fs::write(gateway.folder().join("one.key"), sign().key).unwrap();
    eventually("it is refused", || reloads("is not the key of this certificate") > 0);
    assert_eq!(curl(&target.arguments(&[])).0, "x");
    gateway.signal(Signal::SIGTERM);
}

/// A configuration with one backend, with more keys for it.
fn with_backend(front: &TlsFront, host: &str, more: &str) -> String {
    let port = front.address().port();
    format!(
        "listen: 127.0.0.1:0\nretry: {{retries_max: 0}}\nservices: {{svc: {{models: {{mdl: {{backends: [\
         {{id: a, url: \"https://{host}:{port}\", {more}}}]}}}}}}}}\n"
    )
}

#[test]
fn a_backend_is_verified_unless_that_is_switched_off() {
    let upstream = Upstream::named("x");
    let (authority, others) = (Authority::new(), Authority::new());
    let folder = tempfile::tempdir().unwrap();
    let ca = authority.write(folder.path()).to_string_lossy().into_owned();
    let front = |pair: &Pair| TlsFront::start(pair, None, &[], upstream.address());
    let named = front(&authority.sign(&["localhost"]));
    let addressed = front(&authority.sign(&["127.0.0.1"]));
    let elsewhere = front(&authority.sign(&["other.example"]));
    let unknown = front(&others.sign(&["localhost"]));
    let believe = format!("tls: {{ca_file: \"{ca}\"}}");
    let called = format!("tls: {{ca_file: \"{ca}\", server_name: other.example}}");
    for (front, host, more, works) in [
        (&named, "localhost", believe.as_str(), true),
        (&named, "localhost", "", false),
        (&named, "127.0.0.1", &believe, false),
        (&addressed, "127.0.0.1", &believe, true),
        (&elsewhere, "localhost", &believe, false),
        (&elsewhere, "localhost", &called, true),
        (&unknown, "localhost", &believe, false),
        (&unknown, "localhost", "tls: {verify: false}", true),
    ] {
        let mut gateway = Gateway::start(&with_backend(front, host, more));
        let answer = crate::harness::get(gateway.address(), "/svc/mdl/x", &[]);
        assert_eq!(answer.text() == "x", works, "{host} {more}: {}", answer.text());
        let status = if works { "healthy" } else { "unhealthy" };
        gateway.wait_backend("svc/mdl", "a", status);
        if more.contains("verify") {
            gateway.wait_log("tls.verify is false, so anybody on the way can pose as");
        }
    }
}

#[test]
fn a_backend_is_shown_a_certificate_where_it_wants_one() {
    let upstream = Upstream::named("x");
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let ca = authority.write(folder.path()).to_string_lossy().into_owned();
    authority.sign(&["client"]).write(folder.path(), "client");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (cert, key) = (path("client.pem"), path("client.key"));
    let pair = authority.sign(&["localhost"]);
    let front = TlsFront::start(&pair, Some(&authority), &[], upstream.address());
    let shown = format!("tls: {{ca_file: \"{ca}\", cert_file: \"{cert}\", key_file: \"{key}\"}}");
    for (more, works) in [(shown, true), (format!("tls: {{ca_file: \"{ca}\"}}"), false)] {
        let gateway = Gateway::start(&with_backend(&front, "localhost", &more));
        for _ in 0..2 {
            let answer = crate::harness::get(gateway.address(), "/svc/mdl/x", &[]);
            assert_eq!(answer.text() == "x", works, "{more}: {}", answer.text());
        }
    }
}

#[test]
fn wrong_certificates_are_named_with_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    authority.write(folder.path());
    authority.sign(&["a.example"]).write(folder.path(), "a");
    authority.sign(&["b.example"]).write(folder.path(), "b");
    let text = "listen: https://127.0.0.1:0\n\
         tls:\n\
        \x20 certificates:\n\
        \x20   - {cert_file: a.pem, key_file: b.key}\n\
        \x20   - {cert_file: a.key, key_file: a.pem}\n\
        \x20   - {cert_file: nope.pem, key_file: a.key}\n\
        \x20   - {cert_file: a.pem}\n\
        \x20 client_certificates: required\n\
        \x20 min_version: 1.1\n\
         services: {s: {models: {m: {backends: [\n\
        \x20 {id: a, url: \"http://h\", tls: {verify: false}},\n\
        \x20 {id: b, url: \"https://h\", tls: {ca_file: a.key, server_name: \"a b\"}},\n\
         ]}}}}\n";
    std::fs::write(folder.path().join("t.yaml"), text).unwrap();
    let output = run_program(folder.path(), &[], &["check", "-c", "t.yaml"]);
    assert_eq!(output.status.code(), Some(78));
    let lines = String::from_utf8(output.stderr).unwrap();
    for expected in [
        "tls.certificates[0].key_file: is not the key of this certificate (t.yaml:4:",
        "tls.certificates[1].cert_file: no certificate in PEM form in it (t.yaml:5:",
        "tls.certificates[1].key_file: no private key in it; it may not have a passphrase",
        "tls.certificates[2].cert_file: cannot read nope.pem: No such file",
        "tls.certificates[3].key_file: is missing; a certificate takes cert_file and key_file",
        "tls.client_certificates: needs client_ca_file, which says whose certificates are taken",
        "tls.min_version: expected 1.2 or 1.3",
        "services.s.models.m.backends[0].tls: is for backends with an https URL",
        "services.s.models.m.backends[1].tls.ca_file: no certificate in PEM form in it",
        "services.s.models.m.backends[1].tls.server_name: expected the name or address",
    ] {
        assert!(lines.contains(expected), "{expected} in\n{lines}");
    }
    assert!(!lines.contains("PRIVATE KEY"), "{lines}");
}

#[test]
fn a_system_whose_authorities_cannot_be_read_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("roots.pem");
    std::fs::write(&file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    let variables =
        [("UPSTREAM_URL", "http://127.0.0.1:1"), ("SSL_CERT_FILE", file.to_str().unwrap())];
    let output = run_program(folder.path(), &variables, &["serve"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("cannot read the system's certificates (SSL_CERT_FILE"), "{told}");
    assert!(!told.contains("panicked"), "{told}");
    assert_eq!(output.status.code(), Some(1));
}

/// A connection with TLS, its handshake done, that offers `alpn`.
fn connect(
    gateway: &Gateway,
    ca: &Path,
    alpn: &str,
) -> rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream> {
    use rustls::pki_types::pem::PemObject;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let mut config =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let name = "gate.example".try_into().unwrap();
    let mut client = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut socket = std::net::TcpStream::connect(gateway.wait_listens("https")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    while client.is_handshaking() {
        client.complete_io(&mut socket).unwrap();
    }
    rustls::StreamOwned::new(client, socket)
}

#[test]
fn a_client_that_says_nothing_after_its_handshake_is_parted_from() {
    let upstream = Upstream::start(|_, reply| {
        std::thread::park_timeout(Duration::from_millis(900));
        reply.text("slow");
    });
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(folder.path());
    authority.sign(&["gate.example"]).write(folder.path(), "one");
    let more = "}\nclient: {idle_timeout: 300ms, head_timeout: 1s";
    let gateway = gateway(folder, &["one"], more, &upstream.url());
    for (alpn, said) in [("h2", ""), ("h2", "PRI * HTTP/2.0"), ("http/1.1", "")] {
        let mut client = connect(&gateway, &ca, alpn);
        client.write_all(said.as_bytes()).unwrap();
        // What HTTP/2 says first may come; then the end.
        let mut rest = Vec::new();
        let end = client.read_to_end(&mut rest);
        assert!(
            !matches!(&end, Err(error) if error.kind() == ErrorKind::WouldBlock),
            "{alpn} {said:?}"
        );
    }
    // Who has sent a request waits for its answer.
    let url = format!("https://gate.example:{}/svc/mdl/slow", gateway.wait_listens("https").port());
    let to = format!("gate.example:{}:127.0.0.1", gateway.wait_listens("https").port());
    let ca = ca.to_str().unwrap();
    let (answer, error) = curl(&["--http2", "--cacert", ca, "--resolve", &to, &url]);
    assert_eq!((answer.as_str(), error.as_str()), ("slow", ""));
}

#[test]
fn who_leaves_over_tls_does_not_keep_a_place_in_line() {
    let upstream = Upstream::start(|_, reply| {
        reply.wait_closed();
    });
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = authority.write(folder.path());
    authority.sign(&["gate.example"]).write(folder.path(), "one");
    let more = "}\nupstream: {inflight_max: 1";
    let gateway = gateway(folder, &["one"], more, &upstream.url());
    let request = b"GET /svc/mdl/x HTTP/1.1\r\nHost: g\r\n\r\n";
    let mut first = connect(&gateway, &ca, "http/1.1");
    first.write_all(request).unwrap();
    eventually("it is at work", || upstream.seen().len() == 1);
    let mut second = connect(&gateway, &ca, "http/1.1");
    second.write_all(request).unwrap();
    eventually("it waits in line", || gateway.inflight() == 2);
    // It says that it closes, and closes: the bytes that say so stand before the end.
    second.conn.send_close_notify();
    second.flush().unwrap();
    second.sock.shutdown(std::net::Shutdown::Write).unwrap();
    eventually("it waits no more", || gateway.inflight() == 1);
    drop(first);
    eventually("nobody is there", || gateway.inflight() == 0);
    assert_eq!(upstream.seen().len(), 1);
}
