//! A real PostgreSQL server in a folder of its own.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown, geteuid};
use tempfile::TempDir;

use super::{eventually, free_port};

/// A running server. It ends with the test.
pub(crate) struct Postgres {
    child: Option<Child>,
    folder: TempDir,
    port: u16,
}

/// Debian keeps the server's programs apart, by version.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
    let programs = versions.map(|entry| entry.expect("an entry").path().join("bin").join(name));
    programs.filter(|program| program.exists()).max().expect("PostgreSQL's server is installed")
}

/// It refuses to run as root.
fn as_nobody_special(command: &mut Command) -> &mut Command {
    if let Some(user) = user() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

fn user() -> Option<User> {
    let user = || User::from_name("postgres").expect("users can be read").expect("it has a user");
    geteuid().is_root().then(user)
}

impl Postgres {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        if let Some(user) = user() {
            chown(folder.path(), Some(user.uid), Some(user.gid)).expect("root may");
        }
        let data = folder.path().join("data");
        let mut init = Command::new(program("initdb"));
        init.args(["-A", "trust", "-U", "tollgate", "-E", "UTF8", "--no-sync", "-D"]).arg(data);
        assert!(as_nobody_special(&mut init).status().expect("initdb runs").success());
        let mut postgres = Self { child: None, folder, port: free_port() };
        postgres.restart();
        postgres
    }

    /// Starts it again, with what it had.
    pub(crate) fn restart(&mut self) {
        let mut server = Command::new(program("postgres"));
        server.arg("-D").arg(self.folder.path().join("data")).arg("-k").arg(self.folder.path());
        server.args(["-p", &self.port.to_string(), "-c", "listen_addresses=127.0.0.1"]);
        self.child = Some(as_nobody_special(&mut server).spawn().expect("postgres runs"));
        eventually("PostgreSQL answers", || self.ask("SELECT 1") == "1");
    }

    /// Ends it at once, as an operator would who is in a hurry.
    pub(crate) fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGQUIT).expect("it runs");
            child.wait().expect("it ends");
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("postgres://tollgate:hunter2@127.0.0.1:{}/postgres?sslmode=disable", self.port)
    }

    /// Asks it something with its own client; columns are separated by bars.
    pub(crate) fn ask(&self, sql: &str) -> String {
        let port = self.port.to_string();
        let arguments =
            ["-h", "127.0.0.1", "-p", &port, "-U", "tollgate", "-d", "postgres", "-Atc"];
        let output = Command::new("psql").args(arguments).arg(sql).output().expect("psql runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}
