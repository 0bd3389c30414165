//! A real Redis server in a folder of its own.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use tempfile::TempDir;

use super::eventually;

/// A running server. It ends with the test.
pub(crate) struct Redis {
    child: Option<Child>,
    folder: TempDir,
    arguments: Vec<String>,
    address: SocketAddr,
}

/// A port that is free now, and that nobody here is given again: below those that the system gives to whoever asks for
/// any (`ip_local_port_range`), other servers and clients of the tests among them; and so is the one 10,000 above it, where a
/// cluster speaks with itself.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 10_000;
    // Another run of the tests beginning in the same moment begins elsewhere.
    let offset = (std::process::id() % u32::from(COUNT)) as u16;
    (0..COUNT)
        .map(|_| FIRST + (offset + NEXT.fetch_add(1, Ordering::Relaxed) % COUNT) % COUNT)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

impl Redis {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With more arguments.
    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        Self::at(free_port(), arguments)
    }

    /// Starts it again, with an empty memory.
    pub(crate) fn restart(&mut self) {
        let has_port = self.arguments.iter().any(|argument| argument == "--port");
        let port = self.address.port().to_string();
        let mut command = Command::new("redis-server");
        if !has_port {
            command.args(["--port", &port]);
        }
        command
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no"])
            .args(&self.arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        self.child = Some(command.spawn().expect("redis-server is installed"));
        eventually("Redis listens", || std::net::TcpStream::connect(self.address).is_ok());
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Says that it listens there, where its arguments have it so.
    pub(crate) fn at(port: u16, arguments: &[&str]) -> Self {
        let mut redis = Self {
            child: None,
            folder: tempfile::tempdir().expect("a folder"),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            address: SocketAddr::from(([127, 0, 0, 1], port)),
        };
        redis.restart();
        redis
    }

    /// Asks it something with its own client.
    pub(crate) fn ask(&self, words: &[&str]) -> String {
        let port = self.address.port().to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(words).output();
        String::from_utf8(output.expect("redis-cli is installed").stdout).expect("text")
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
