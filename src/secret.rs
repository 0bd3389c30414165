//! A string that cannot be printed: keys and credentials.

use std::fmt;

use ring::digest::{SHA256, digest};
use ring::hmac;
use subtle::ConstantTimeEq;

/// A secret in memory. `Debug` shows only that it is one, and there is no `Display`: whoever needs
/// the text must ask for it with [`Secret::expose`].
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// As [`Secret`], for keys that are no text.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// Wraps `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes themselves, for the one place that uses them.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// How a key is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hashing {
    /// SHA-256: enough for keys of 256 random bits, which nobody can guess.
    Sha256,
    /// HMAC-SHA-256 (RFC 2104) with a secret of the server: whoever has the hashes cannot try keys either.
    HmacSha256,
}

impl Hashing {
    /// What a hash of this kind begins with, as it is written.
    const ALL: [(&str, Self); 2] = [("hmac-sha256:", Self::HmacSha256), ("sha256:", Self::Sha256)];
}

/// The hash of a key. Comparing two takes the same time wherever the keys differ and whatever their lengths
/// are, so an answer's timing tells a caller nothing about a key.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyHash {
    hashing: Hashing,
    bytes: [u8; 32],
}

impl KeyHash {
    /// The SHA-256 of a key as it came over the wire.
    #[must_use]
    pub fn sha256(key: &[u8]) -> Self {
        Self::new(Hashing::Sha256, digest(&SHA256, key).as_ref())
    }

    /// The HMAC-SHA-256 of a key with the server's `secret`.
    #[must_use]
    pub fn hmac(secret: &SecretBytes, key: &[u8]) -> Self {
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret.expose());
        Self::new(Hashing::HmacSha256, hmac::sign(&secret, key).as_ref())
    }

    fn new(hashing: Hashing, hash: &[u8]) -> Self {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(hash);
        Self { hashing, bytes }
    }

    /// Reads `sha256:` or `hmac-sha256:` and 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let parse =
            |(prefix, hashing): &(&str, Hashing)| Some((text.strip_prefix(prefix)?, *hashing));
        let (digits, hashing) = Hashing::ALL.iter().find_map(parse)?;
        let digits = digits.as_bytes();
        let mut bytes = [0; 32];
        if digits.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            let digit = |at: usize| char::from(pair[at]).to_digit(16);
            *byte = u8::try_from(digit(0)? * 16 + digit(1)?).ok()?;
        }
        Some(Self { hashing, bytes })
    }

    /// As it is written in a configuration.
    #[must_use]
    pub fn text(&self) -> String {
        let prefix = Hashing::ALL.iter().find(|(_, hashing)| *hashing == self.hashing);
        let mut text = prefix.map_or("", |(prefix, _)| prefix).to_owned();
        text.extend(self.bytes.iter().map(|byte| format!("{byte:02x}")));
        text
    }

    /// How it was hashed.
    #[must_use]
    pub fn hashing(&self) -> Hashing {
        self.hashing
    }

    /// Half of the hash, to find what may be the same key: as good as none of another key has it.
    #[must_use]
    pub fn half(&self) -> u128 {
        let mut half = [0; 16];
        half.copy_from_slice(&self.bytes[..16]);
        u128::from_be_bytes(half)
    }

    /// Whether both are the hash of the same key, in constant time.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        self.hashing == other.hashing && bool::from(self.bytes.ct_eq(&other.bytes))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[key hash]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_neither_a_secret_nor_a_hash() {
        let shown = format!("{:?} {:?}", Secret::new("sk-visible"), KeyHash::sha256(b"sk-visible"));
        assert_eq!(shown, "[secret] [key hash]");
    }

    #[test]
    fn hashes_match_for_the_same_key_only() {
        let secret = SecretBytes::new(b"server".to_vec());
        let hashes = [KeyHash::sha256(b"sk-1"), KeyHash::hmac(&secret, b"sk-1")];
        assert!(hashes.iter().all(|hash| hash.matches(hash)));
        assert!(!hashes[0].matches(&hashes[1]));
        for other in ["", "sk-2", "SK-1", "sk-1 ", "sk-10"] {
            assert!(!hashes[0].matches(&KeyHash::sha256(other.as_bytes())), "{other:?}");
            assert!(!hashes[1].matches(&KeyHash::hmac(&secret, other.as_bytes())), "{other:?}");
        }
        let other = SecretBytes::new(b"Server".to_vec());
        assert!(!hashes[1].matches(&KeyHash::hmac(&other, b"sk-1")));
    }

    #[test]
    fn a_hash_is_read_as_it_is_written() {
        let hash = KeyHash::sha256(b"abc");
        // FIPS 180-2, appendix B.1.
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.text(), text);
        // RFC 4231, test case 2.
        let mac =
            KeyHash::hmac(&SecretBytes::new(b"Jefe".to_vec()), b"what do ya want for nothing?");
        let mac_text =
            "hmac-sha256:5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(mac.text(), mac_text);
        assert_eq!(KeyHash::parse(text), Some(hash));
        assert_eq!(
            KeyHash::parse(&mac_text.to_uppercase().replace("HMAC-SHA", "hmac-sha")),
            Some(mac)
        );
        for wrong in ["", "sha256:", &text[7..], &text[..70], &text.replace('b', "g"), "md5:00"] {
            assert_eq!(KeyHash::parse(wrong), None, "{wrong}");
        }
    }
}
