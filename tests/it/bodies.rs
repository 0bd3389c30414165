//! Bodies of any size pass without being held.

use std::io::Read;
use std::sync::Mutex;
use std::sync::mpsc::channel;

use crate::harness::{Connection, Gateway, Upstream, config, config_of, raw_upstream, send};

const BYTES: usize = 200 * 1024 * 1024;
const MEMORY_MIB_MAX: u64 = 40;

#[test]
fn a_200_mb_upload_passes_in_little_memory() {
    let upstream = Upstream::start(|seen, reply| reply.text(&seen.body_bytes.to_string()));
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    let head =
        format!("POST /svc/mdl/v1/files HTTP/1.1\r\nHost: g\r\nContent-Length: {BYTES}\r\n\r\n");
    connection.write(head.as_bytes()).unwrap();
    let piece = vec![b'x'; 1024 * 1024];
    for _ in 0..BYTES / piece.len() {
        connection.write(&piece).unwrap();
    }
    assert_eq!(connection.read(false).unwrap().text(), BYTES.to_string());
    let peak = gateway.peak_memory_mib();
    println!("200 MB up: {peak} MiB resident at most");
    assert!(peak < MEMORY_MIB_MAX, "{peak} MiB");
}

#[test]
fn a_200_mb_download_passes_in_little_memory() {
    let upstream = Upstream::start(|_, reply| {
        reply.raw(format!("HTTP/1.1 200 OK\r\nContent-Length: {BYTES}\r\n\r\n").as_bytes());
        let piece = vec![b'x'; 1024 * 1024];
        for _ in 0..BYTES / piece.len() {
            reply.raw(&piece);
        }
    });
    let gateway = Gateway::start(&config("", &[&upstream]));
    let mut connection = Connection::open(gateway.address());
    connection.write(b"GET /svc/mdl/v1/files/1/content HTTP/1.1\r\nHost: g\r\n\r\n").unwrap();
    assert_eq!(connection.read_head().unwrap().header("content-length"), BYTES.to_string());
    let mut body = connection.into_body();
    let mut buffer = vec![0; 1024 * 1024];
    let mut bytes = 0;
    while bytes < BYTES {
        match body.read(&mut buffer).unwrap() {
            0 => break,
            read => bytes += read,
        }
    }
    assert_eq!(bytes, BYTES);
    let peak = gateway.peak_memory_mib();
    println!("200 MB down: {peak} MiB resident at most");
    assert!(peak < MEMORY_MIB_MAX, "{peak} MiB");
}

#[test]
fn a_chunked_body_reaches_the_backend_as_it_is_sent() {
    let upstream = Upstream::start(|seen, reply| reply.send(200, &[], &seen.body));
    let gateway = Gateway::start(&config("", &[&upstream]));
    let answer = send(
        gateway.address(),
        "POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nchun\r\n3\r\nked\r\n0\r\n\r\n",
    );
    assert_eq!((answer.status, answer.text().as_str()), (200, "chunked"));
    assert_eq!(upstream.last().header("transfer-encoding").to_lowercase(), "chunked");
    assert!(!upstream.last().has("content-length"));
}

#[test]
fn a_body_that_is_not_held_reaches_the_backend_while_the_client_sends_it() {
    let (got, received) = channel();
    let got = Mutex::new(got);
    let url = raw_upstream(move |stream| read_on(stream, &got.lock().unwrap().clone()));
    let gateway = Gateway::start(&config_of("replay: {body_bytes_max: 0}", &[&url]));
    let received = Mutex::new(received);
    let wait_for = |text: &str| {
        let mut all = String::new();
        while !all.contains(text) {
            all.push_str(&received.lock().unwrap().recv_timeout(crate::harness::PATIENCE).unwrap());
        }
    };
    let mut connection = Connection::open(gateway.address());
    connection
        .write(b"POST /svc/mdl/x HTTP/1.1\r\nHost: g\r\nContent-Length: 12\r\n\r\nfirst-")
        .unwrap();
    wait_for("first-");
    connection.write(b"second").unwrap();
    wait_for("second");
}

fn read_on(mut stream: std::net::TcpStream, got: &std::sync::mpsc::Sender<String>) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        let _ = got.send(String::from_utf8_lossy(&buffer[..read]).into_owned());
    }
}
