//! Where a backend's name leads, looked up off the request path; the last good answer is kept.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{fmt, io};

use arc_swap::ArcSwap;

use crate::config::Host;

/// Longest wait for one look-up. glibc's own default is 5 s a server and two attempts.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// The addresses of one host and port, and which of them is used now.
#[derive(Debug)]
pub struct Addresses {
    host: Host,
    port: u16,
    known: ArcSwap<Vec<SocketAddr>>,
    cursor: AtomicUsize,
}

impl Addresses {
    /// The addresses of `host`; of a name, none until the first [`Addresses::refresh`].
    #[must_use]
    pub fn new(host: Host, port: u16) -> Self {
        let known = match &host {
            Host::Address(address) => vec![SocketAddr::new(*address, port)],
            Host::Name(_) | Host::Unix(_) => Vec::new(),
        };
        Self { host, port, known: ArcSwap::from_pointee(known), cursor: AtomicUsize::new(0) }
    }

    /// The addresses of a name as a test wants them.
    #[cfg(test)]
    pub(crate) fn of_name(name: &str, known: &[SocketAddr]) -> Self {
        let addresses = Self::new(Host::Name(name.to_owned()), known[0].port());
        addresses.known.store(Arc::new(known.to_vec()));
        addresses
    }

    /// The name that is looked up, if it is one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match &self.host {
            Host::Name(name) => Some(name),
            Host::Address(_) | Host::Unix(_) => None,
        }
    }

    /// How many addresses are known.
    #[must_use]
    pub fn count(&self) -> usize {
        if matches!(self.host, Host::Unix(_)) { 1 } else { self.known.load().len() }
    }

    /// The address in use, unless none is known yet.
    #[must_use]
    pub fn current(&self) -> Option<Address> {
        if let Host::Unix(path) = &self.host {
            return Some(Address::Unix(path.clone()));
        }
        let known = self.known.load();
        let at = self.cursor.load(Ordering::Relaxed).checked_rem(known.len())?;
        Some(Address::Tcp(known[at]))
    }

    /// `failed` could not be connected to: the next one is used from now on.
    pub fn pass_over(&self, failed: &Address) {
        if self.current().as_ref() == Some(failed) {
            self.cursor.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Looks the name up again.
    ///
    /// # Errors
    /// When that fails; what was known before stays.
    pub async fn refresh(&self) -> io::Result<()> {
        let Host::Name(name) = &self.host else { return Ok(()) };
        let lookup = tokio::net::lookup_host((name.as_str(), self.port));
        let found = tokio::time::timeout(LOOKUP_TIMEOUT, lookup)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the look-up took too long"))??;
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for address in found {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        let known = self.known.load();
        let same =
            known.len() == addresses.len() && known.iter().all(|old| addresses.contains(old));
        if !same {
            self.known.store(Arc::new(addresses));
            self.cursor.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_has_addresses_after_its_look_up_and_keeps_them() {
        let addresses = Addresses::new(Host::Name("localhost".into()), 80);
        assert_eq!(addresses.current(), None);
        addresses.refresh().await.unwrap();
        let Some(Address::Tcp(known)) = addresses.current() else { panic!("it is known") };
        assert!(known.ip().is_loopback());
        let nowhere = Addresses::new(Host::Name("no-such-host.invalid".into()), 80);
        assert!(nowhere.refresh().await.is_err());
        assert_eq!(nowhere.current(), None);
    }

    #[test]
    fn an_address_that_fails_is_passed_over_once() {
        let one: SocketAddr = "127.0.0.1:80".parse().unwrap();
        let two: SocketAddr = "127.0.0.2:80".parse().unwrap();
        let addresses = Addresses::of_name("two", &[one, two]);
        let [one, two] = [one, two].map(Address::Tcp);
        addresses.pass_over(&one);
        addresses.pass_over(&one);
        assert_eq!(addresses.current().as_ref(), Some(&two));
        addresses.pass_over(&two);
        assert_eq!(addresses.current(), Some(one));
    }
}
