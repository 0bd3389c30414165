//! Tokens that others issue: verified by their public keys, from a file or a URL.

use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use serde_json::{Value, json};

use crate::harness::{Answer, Gateway, Upstream, config, eventually, get, post};

const CHAT: &str = "/v1/chat/completions";
const ISSUER: &str = "https://login.example.com/";

/// A key that tokens are signed with, and its public half as a JWK.
struct Signer {
    algorithm: Algorithm,
    key: EncodingKey,
    jwk: Value,
}

fn base64(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

impl Signer {
    fn ed25519(id: &str) -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
        let x = base64(pair.public_key().as_ref());
        Self {
            algorithm: Algorithm::EdDSA,
            key: EncodingKey::from_ed_der(pkcs8.as_ref()),
            jwk: json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": x}),
        }
    }

    fn p256(id: &str) -> Self {
        let random = SystemRandom::new();
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).unwrap();
        // An uncompressed point: 4, x and y.
        let point = pair.public_key().as_ref();
        let (x, y) = (base64(&point[1..33]), base64(&point[33..]));
        Self {
            algorithm: Algorithm::ES256,
            key: EncodingKey::from_ec_der(pkcs8.as_ref()),
            jwk: json!({"kty": "EC", "crv": "P-256", "kid": id, "x": x, "y": y}),
        }
    }

    fn rsa(id: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.der");
        let file = file.to_str().unwrap();
        let openssl = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        };
        openssl(&["genrsa", "-traditional", "-out", file, "2048"]);
        openssl(&["rsa", "-in", file, "-traditional", "-outform", "DER", "-out", file]);
        let modulus = openssl(&["rsa", "-in", file, "-inform", "DER", "-modulus", "-noout"]);
        let hex = String::from_utf8(modulus).unwrap();
        let hex = hex.trim().strip_prefix("Modulus=").unwrap();
        let digits: Vec<u8> = hex.bytes().collect();
        let n: Vec<u8> = digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        Self {
            algorithm: Algorithm::RS256,
            key: EncodingKey::from_rsa_der(&std::fs::read(file).unwrap()),
            jwk: json!({"kty": "RSA", "kid": id, "n": base64(&n), "e": "AQAB"}),
        }
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header {
            kid: self.jwk["kid"].as_str().map(str::to_owned),
            ..Header::new(self.algorithm)
        };
        encode(&header, claims, &self.key).unwrap()
    }

    /// As [`Self::sign`], with whatever there may be in a head.
    fn sign_parts(&self, head: &Value, claims: &Value) -> String {
        let signed = format!(
            "{}.{}",
            base64(head.to_string().as_bytes()),
            base64(claims.to_string().as_bytes())
        );
        let signature =
            jsonwebtoken::crypto::sign(signed.as_bytes(), &self.key, self.algorithm).unwrap();
        format!("{signed}.{signature}")
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn claims() -> Value {
    json!({"iss": ISSUER, "aud": "tollgate", "sub": "alice", "exp": now() + 3600})
}

/// Good claims, with another value for one of them; null: without it.
fn claims_with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
    claims
}

fn jwks(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| &signer.jwk).collect::<Vec<_>>()}).to_string()
}

fn ask(gateway: &Gateway, token: &str, body: &str) -> Answer {
    let authorization = format!("Authorization: Bearer {token}");
    post(gateway.address(), CHAT, &[&authorization], body)
}

const BODY: &str = r#"{"model":"mdl"}"#;

/// A gateway that takes the tokens of one issuer, whose keys are in a file.
fn gateway(top: &str, more: &str, keys: &str, upstream: &Upstream) -> Gateway {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("jwks.json"), keys).unwrap();
    let jwt = format!(
        "jwt: [{{name: sso, issuer: \"{ISSUER}\", audience: tollgate, jwks_file: jwks.json{more}}}]"
    );
    let config = config(&format!("{top}\n{jwt}"), &[upstream]);
    std::fs::write(folder.path().join("tollgate.yaml"), config).unwrap();
    Gateway::start_in(folder, &[("LOG_LEVEL", "DEBUG")], &[])
}

#[test]
fn a_token_of_each_kind_is_as_good_as_a_key() {
    let upstream = Upstream::named("x");
    let signers = [Signer::rsa("r"), Signer::p256("e"), Signer::ed25519("o")];
    let keys = jwks(&signers.each_ref());
    let gateway = gateway("ledger: {}", "", &keys, &upstream);
    for signer in &signers {
        for _ in 0..2 {
            assert_eq!(ask(&gateway, &signer.sign(&claims()), BODY).status, 200, "{}", signer.jwk);
        }
    }
    // No backend sees it.
    assert!(upstream.seen().iter().all(|seen| !seen.has("authorization")));
    let file = gateway.folder().join("state/ledger.db");
    eventually("it is known who it was", || {
        let Ok(database) = rusqlite::Connection::open(&file) else { return false };
        let count =
            "SELECT count(*) FROM api_usage WHERE user_id = 'alice' AND key_id = 'sso:alice'";
        database.query_row(count, [], |row| row.get(0)).is_ok_and(|count: i64| count == 6)
    });
    assert_eq!(get(gateway.address(), "/v1/models", &[]).status, 401);
}

#[test]
fn a_token_that_is_not_good_is_refused() {
    let upstream = Upstream::named("x");
    let (signer, other) = (Signer::ed25519("a"), Signer::ed25519("a"));
    let rsa = Signer::rsa("r");
    let mut gateway =
        gateway("", ", algorithms: [EdDSA], leeway: 1s", &jwks(&[&signer, &rsa]), &upstream);
    let good = signer.sign(&claims());
    assert_eq!(ask(&gateway, &good, BODY).status, 200);
    let parts: Vec<&str> = good.split('.').collect();
    let unsigned = base64(br#"{"alg":"none","typ":"JWT"}"#);
    // Signed with what everybody knows.
    let public = EncodingKey::from_secret(signer.jwk["x"].as_str().unwrap().as_bytes());
    let confused = encode(
        &Header { kid: Some("a".into()), ..Header::new(Algorithm::HS256) },
        &claims(),
        &public,
    );
    let critical = Header { kid: Some("a".into()), ..Header::new(Algorithm::EdDSA) };
    let mut critical = serde_json::to_value(critical).unwrap();
    critical["crit"] = json!(["b64"]);
    let critical = signer.sign_parts(&critical, &claims());
    let mut forged = claims();
    forged["sub"] = "root".into();
    let forged = base64(forged.to_string().as_bytes());
    for (token, code) in [
        (other.sign(&claims()), "invalid_api_key"),
        (rsa.sign(&claims()), "invalid_api_key"),
        (format!("{unsigned}.{}.", parts[1]), "invalid_api_key"),
        (format!("{unsigned}.{}.{}", parts[1], parts[2]), "invalid_api_key"),
        (confused.unwrap(), "invalid_api_key"),
        (critical, "invalid_api_key"),
        (format!("{}.{forged}.{}", parts[0], parts[2]), "invalid_api_key"),
        (format!("{}.{}.", parts[0], parts[1]), "invalid_api_key"),
        (format!("{good}x"), "invalid_api_key"),
        ("eyJ..".to_owned(), "invalid_api_key"),
        (signer.sign(&claims_with("iss", "https://evil.example.com/".into())), "invalid_api_key"),
        (signer.sign(&claims_with("iss", Value::Null)), "invalid_api_key"),
        (signer.sign(&claims_with("aud", "other".into())), "invalid_api_key"),
        (signer.sign(&claims_with("aud", Value::Null)), "invalid_api_key"),
        (signer.sign(&claims_with("exp", Value::Null)), "invalid_api_key"),
        (signer.sign(&claims_with("exp", (now() - 60).into())), "expired_api_key"),
        (signer.sign(&claims_with("nbf", (now() + 600).into())), "invalid_api_key"),
        (signer.sign(&claims_with("sub", Value::Null)), "invalid_api_key"),
        (
            Signer { jwk: json!({"kid": "unknown"}), ..Signer::ed25519("x") }.sign(&claims()),
            "invalid_api_key",
        ),
    ] {
        let answer = ask(&gateway, &token, BODY);
        assert_eq!(
            (answer.status, &answer.json()["error"]["code"]),
            (401, &json!(code)),
            "{token}"
        );
    }
    assert_eq!(upstream.seen().len(), 1);
    // What is wrong is for the log alone; the token is for nobody.
    for why in [
        "its issuer is not known here",
        "its algorithm is HS256",
        "InvalidAudience",
        "it has a crit",
    ] {
        gateway.wait_log(&format!("a token is refused: {why}"));
    }
    assert!(!gateway.log().join("\n").contains(parts[2]));
}

#[test]
fn what_tokens_are_good_for_is_said_by_their_issuers_entry_and_their_claims() {
    let upstream = Upstream::named("x");
    let signer = Signer::ed25519("a");
    let more = ", models: [mdl, other], models_claim: models, limits: [{requests: 2, window: 1h}]";
    let gateway = gateway("api_key: sk-global", more, &jwks(&[&signer]), &upstream);
    let token = |name: &str, models: Value| {
        let mut claims = claims_with("models", models);
        claims["sub"] = name.into();
        signer.sign(&claims)
    };
    for (models, status) in [
        (json!(["mdl"]), 200),
        (json!("x mdl"), 200),
        (json!(["*"]), 200),
        (json!(["other"]), 403),
        (Value::Null, 403),
    ] {
        let name = models.to_string();
        assert_eq!(ask(&gateway, &token(&name, models), BODY).status, status, "{name}");
    }
    // Each has its own count, whatever token it shows.
    let bob = |at: u64| {
        let mut claims = claims_with("models", json!(["mdl"]));
        claims["sub"] = "bob".into();
        claims["iat"] = at.into();
        ask(&gateway, &signer.sign(&claims), BODY).status
    };
    assert_eq!([bob(1), bob(2), bob(3)], [200, 200, 429]);
    // A key is still as good as before.
    assert_eq!(ask(&gateway, "sk-global", BODY).status, 200);
}

#[test]
fn public_keys_are_fetched_from_a_url_and_again_when_there_is_a_new_one() {
    let upstream = Upstream::named("x");
    let (first, second) = (Signer::ed25519("first"), Signer::p256("second"));
    let keys = Arc::new(Mutex::new(jwks(&[&first])));
    let login = Upstream::start({
        let keys = Arc::clone(&keys);
        move |_, reply| {
            let text = keys.lock().unwrap().clone();
            reply.send(200, &[("Content-Type", "application/json")], text.as_bytes());
        }
    });
    let jwt = format!(
        "jwt: [{{name: sso, issuer: \"{ISSUER}\", jwks_url: \"{}/keys?v=1\"}}]",
        login.url()
    );
    let gateway = Gateway::start(&config(&jwt, &[&upstream]));
    let token = first.sign(&claims());
    eventually("the keys are there", || ask(&gateway, &token, BODY).status == 200);
    assert_eq!(login.last().target(), "/keys?v=1");
    *keys.lock().unwrap() = jwks(&[&first, &second]);
    let rotated = second.sign(&claims());
    let mut statuses = Vec::new();
    eventually("the new key is there", || {
        statuses.push(ask(&gateway, &rotated, BODY).status);
        statuses.last() == Some(&200)
    });
    // Who came first was asked to come again: SDKs do.
    assert!(
        statuses[..statuses.len() - 1].iter().all(|status| matches!(status, 503 | 401)),
        "{statuses:?}"
    );
    // A name of a key that nobody has does not have them fetched again and again.
    let fetched = login.seen().len();
    for id in 0..20 {
        let unknown = Signer { jwk: json!({"kid": id.to_string()}), ..Signer::ed25519("x") };
        assert_ne!(ask(&gateway, &unknown.sign(&claims()), BODY).status, 200);
    }
    assert!(login.seen().len() <= fetched + 1, "{} {fetched}", login.seen().len());
}
