//! The configuration as it is written: `Option` means "not written". Nothing outside `config`
//! sees these types.

mod cache;
mod hooks;

use std::fmt;

use indexmap::IndexMap;
use rust_decimal::Decimal;
use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor, value::SeqAccessDeserializer};

use super::snapshot::TlsVersion;
use super::units::{Size, Span};
use crate::secret::Secret;

pub(super) use cache::{FileCache, FileCachedPer, FileCachedRequests, FileCaching, FileStore};
pub(super) use hooks::{
    FileAction, FileAnswer, FileBy, FileCapture, FileFields, FileGuard, FileHeaders, FileHook,
    FileRefuse, FileRoute, FileSide, FileText,
};

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileConfig {
    pub(super) listen: Option<OneOrMany>,
    pub(super) tls: Option<FileTls>,
    pub(super) admin: Option<FileAdmin>,
    pub(super) api_key: Option<FileSecret>,
    pub(super) api_key_file: Option<String>,
    pub(super) auth_mode: Option<FileAuthMode>,
    pub(super) keys: Option<Vec<Option<FileKey>>>,
    pub(super) keys_file: Option<String>,
    pub(super) keys_secret: Option<FileSecret>,
    pub(super) keys_secret_file: Option<String>,
    pub(super) jwt: Option<Vec<Option<FileJwt>>>,
    pub(super) addresses: Option<FileAddresses>,
    pub(super) limits: Option<Vec<Option<FileLimit>>>,
    pub(super) output_tokens_assumed: Option<u64>,
    pub(super) redis: Option<FileRedis>,
    pub(super) state_directory: Option<String>,
    pub(super) ledger: Option<FileLedger>,
    pub(super) prices: Option<FilePrices>,
    pub(super) prices_file: Option<String>,
    pub(super) trusted_proxies: Option<OneOrMany>,
    pub(super) cors: Option<FileCors>,
    pub(super) log: Option<FileLog>,
    pub(super) metrics: Option<FileMetrics>,
    pub(super) request_log: Option<FileRequestLog>,
    pub(super) traces: Option<FileTraces>,
    pub(super) threads: Option<u16>,
    pub(super) shutdown_timeout: Option<Span>,
    pub(super) client: Option<FileClient>,
    pub(super) upstream: Option<FileUpstream>,
    pub(super) replay: Option<FileReplay>,
    pub(super) reload: Option<FileReload>,
    pub(super) deadlines: Option<FileDeadlines>,
    pub(super) retry: Option<FileRetry>,
    pub(super) breaker: Option<FileBreaker>,
    pub(super) queue: Option<FileQueue>,
    pub(super) dns: Option<FileDns>,
    pub(super) balance: Option<FileBalance>,
    pub(super) health_check: Option<FileHealthCheck>,
    pub(super) hooks: Option<Vec<Option<FileHook>>>,
    pub(super) cache: Option<FileCache>,
    pub(super) aliases: Option<IndexMap<String, String>>,
    pub(super) fallbacks: Option<IndexMap<String, Option<OneOrMany>>>,
    pub(super) default_model: Option<String>,
    pub(super) default_service: Option<String>,
    pub(super) models_listed: Option<FileListed>,
    pub(super) services: Option<IndexMap<String, FileService>>,
}

/// A file with nothing but keys.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileKeys {
    pub(super) keys: Option<Vec<Option<FileKey>>>,
}

/// A client's key.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileKey {
    pub(super) id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) hash: Option<OneOrMany>,
    pub(super) enabled: Option<bool>,
    pub(super) admin: Option<bool>,
    pub(super) models: Option<OneOrMany>,
    pub(super) services: Option<OneOrMany>,
    pub(super) expires: Option<String>,
    pub(super) addresses: Option<FileAddresses>,
    pub(super) labels: Option<IndexMap<String, String>>,
    pub(super) reserved_tokens: Option<u64>,
    pub(super) limits: Option<Vec<Option<FileLimit>>>,
}

/// Who issues tokens, and what they are good for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileJwt {
    pub(super) name: Option<String>,
    pub(super) issuer: Option<String>,
    pub(super) audience: Option<OneOrMany>,
    pub(super) jwks_url: Option<String>,
    pub(super) jwks_file: Option<String>,
    pub(super) algorithms: Option<OneOrMany>,
    pub(super) name_claim: Option<String>,
    pub(super) models_claim: Option<String>,
    pub(super) leeway: Option<Span>,
    pub(super) admin: Option<bool>,
    pub(super) models: Option<OneOrMany>,
    pub(super) services: Option<OneOrMany>,
    pub(super) addresses: Option<FileAddresses>,
    pub(super) limits: Option<Vec<Option<FileLimit>>>,
}

/// Networks that clients may come from, and may not; for the whole file, a service or a key.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileAddresses {
    pub(super) allow: Option<OneOrMany>,
    pub(super) deny: Option<OneOrMany>,
}

/// A limit; for the whole file or a key.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileLimit {
    pub(super) name: Option<String>,
    pub(super) per: Option<FilePer>,
    pub(super) keys: Option<OneOrMany>,
    pub(super) models: Option<OneOrMany>,
    pub(super) services: Option<OneOrMany>,
    pub(super) window: Option<Span>,
    pub(super) requests: Option<u64>,
    pub(super) tokens: Option<u64>,
    pub(super) tokens_input: Option<u64>,
    pub(super) tokens_output: Option<u64>,
    pub(super) concurrent: Option<u64>,
    pub(super) budget_daily: Option<FileDecimal>,
    pub(super) budget_monthly: Option<FileDecimal>,
    pub(super) shadow: Option<bool>,
    pub(super) when: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FilePer {
    Key,
    Client,
    Address,
    Model,
    Service,
    #[serde(rename = "key+model")]
    KeyModel,
    All,
}

/// Where gateways share what they count.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileRedis {
    pub(super) url: Option<FileSecret>,
    pub(super) url_file: Option<String>,
    pub(super) cluster: Option<bool>,
    pub(super) sentinel_master: Option<String>,
    pub(super) timeout: Option<Span>,
    pub(super) connections: Option<u32>,
    pub(super) prefix: Option<String>,
    pub(super) when_down: Option<FileWhenDown>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FileWhenDown {
    Local,
    Refuse,
}

/// Where usage is kept.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileLedger {
    pub(super) enabled: Option<bool>,
    pub(super) database: Option<FileSecret>,
    pub(super) database_file: Option<String>,
    pub(super) keep_days: Option<u32>,
    pub(super) include_usage: Option<bool>,
    pub(super) queue_rows_max: Option<u32>,
    pub(super) spool_bytes_max: Option<Size>,
}

/// What tokens cost; also all that is in a file of prices.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FilePrices {
    pub(super) currency: Option<String>,
    pub(super) per: Option<u64>,
    pub(super) models: Option<IndexMap<String, FileTariff>>,
}

/// What the tokens of a model cost.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTariff {
    pub(super) input: Option<FileDecimal>,
    pub(super) output: Option<FileDecimal>,
    pub(super) cached: Option<FileDecimal>,
    pub(super) cache_written: Option<FileDecimal>,
    pub(super) tiers: Option<Vec<Option<FileTier>>>,
}

/// What they cost from so many of a month on.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTier {
    pub(super) from: Option<u64>,
    pub(super) input: Option<FileDecimal>,
    pub(super) output: Option<FileDecimal>,
    pub(super) cached: Option<FileDecimal>,
    pub(super) cache_written: Option<FileDecimal>,
}

/// An amount of money, exactly as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct FileDecimal(pub(super) Decimal);

impl<'de> Deserialize<'de> for FileDecimal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DecimalVisitor;
        impl Visitor<'_> for DecimalVisitor {
            type Value = FileDecimal;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount such as 2.50")
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<FileDecimal, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<FileDecimal, E> {
                self.visit_str(&number.to_string())
            }

            // The shortest text of a number is as it was written, up to 15 digits.
            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<FileDecimal, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<FileDecimal, E> {
                match Decimal::from_str_exact(text.trim()) {
                    Ok(amount) if !amount.is_sign_negative() => Ok(FileDecimal(amount)),
                    _ => Err(E::custom("expected an amount such as 2.50")),
                }
            }
        }
        deserializer.deserialize_any(DecimalVisitor)
    }
}

/// TLS of the listeners.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTls {
    pub(super) certificates: Option<Vec<Option<FileCertificate>>>,
    pub(super) client_ca_file: Option<String>,
    pub(super) client_certificates: Option<FileClientAuth>,
    pub(super) min_version: Option<FileTlsVersion>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileCertificate {
    pub(super) cert_file: Option<String>,
    pub(super) key_file: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FileClientAuth {
    Off,
    Optional,
    Required,
}

/// A version of TLS; `1.2` is a number in YAML.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileTlsVersion(pub(super) TlsVersion);

impl<'de> Deserialize<'de> for FileTlsVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VersionVisitor;
        impl Visitor<'_> for VersionVisitor {
            type Value = FileTlsVersion;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("1.2 or 1.3")
            }

            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<FileTlsVersion, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<FileTlsVersion, E> {
                match text {
                    "1.2" => Ok(FileTlsVersion(TlsVersion::Tls12)),
                    "1.3" => Ok(FileTlsVersion(TlsVersion::Tls13)),
                    _ => Err(E::custom("expected 1.2 or 1.3")),
                }
            }
        }
        deserializer.deserialize_any(VersionVisitor)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileAdmin {
    pub(super) listen: Option<OneOrMany>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileCors {
    pub(super) origins: Option<OneOrMany>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileLog {
    pub(super) level: Option<String>,
    pub(super) format: Option<FileLogFormat>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FileLogFormat {
    Text,
    Json,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileMetrics {
    pub(super) enabled: Option<bool>,
}

/// Where each exchange has a line.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileRequestLog {
    pub(super) enabled: Option<bool>,
    pub(super) file: Option<String>,
    pub(super) rotate_bytes: Option<Size>,
    pub(super) rotate_after: Option<Span>,
    pub(super) keep: Option<u32>,
    pub(super) sample: Option<f64>,
    pub(super) when: Option<String>,
    pub(super) queue_bytes_max: Option<Size>,
}

/// Where spans of exchanges go.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTraces {
    pub(super) otlp_url: Option<String>,
    pub(super) headers: Option<IndexMap<String, Option<FileSecret>>>,
    pub(super) sample: Option<f64>,
    pub(super) queue_max: Option<u32>,
    pub(super) service_name: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileClient {
    pub(super) idle_timeout: Option<Span>,
    pub(super) head_timeout: Option<Span>,
    pub(super) body_timeout: Option<Span>,
    pub(super) body_deadline: Option<Span>,
    pub(super) body_rate_min: Option<Size>,
    pub(super) body_bytes_max: Option<Size>,
    pub(super) write_timeout: Option<Span>,
    pub(super) half_close: Option<bool>,
    pub(super) url_bytes_max: Option<Size>,
    pub(super) head_bytes_max: Option<Size>,
    pub(super) connections_max: Option<u32>,
    pub(super) connections_per_address_max: Option<u32>,
    pub(super) http2_streams_max: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileUpstream {
    pub(super) idle_connections: Option<u32>,
    pub(super) idle_timeout: Option<Span>,
    pub(super) inflight_max: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileReplay {
    pub(super) body_bytes_max: Option<Size>,
    pub(super) total_bytes_max: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileReload {
    pub(super) watch: Option<bool>,
}

/// Deadlines as written for the whole file, a service or a model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileDeadlines {
    pub(super) connect: Option<Span>,
    pub(super) tls: Option<Span>,
    pub(super) first_byte: Option<Span>,
    pub(super) silence: Option<Span>,
    pub(super) exchange: Option<Span>,
    pub(super) websocket_idle: Option<Span>,
    pub(super) websocket_total: Option<Span>,
}

/// When a failed attempt is followed by another one; for the whole file, a service or a model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileRetry {
    pub(super) retries_max: Option<u32>,
    pub(super) delay: Option<Span>,
    pub(super) retry_after_max: Option<Span>,
    pub(super) statuses: Option<Statuses>,
    pub(super) fast_500: Option<Span>,
    pub(super) non_idempotent: Option<bool>,
    pub(super) budget: Option<f64>,
    pub(super) budget_min: Option<u32>,
}

/// The circuit breaker of each backend; for the whole file, a service or a model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileBreaker {
    pub(super) enabled: Option<bool>,
    pub(super) consecutive_failures: Option<u32>,
    pub(super) failure_rate: Option<f64>,
    pub(super) failure_rate_exchanges: Option<u32>,
    pub(super) window: Option<Span>,
    pub(super) open: Option<Span>,
    pub(super) open_max: Option<Span>,
    pub(super) slow_start: Option<Span>,
    pub(super) ejected_max: Option<f64>,
    pub(super) fail_open: Option<bool>,
}

/// Where exchanges wait while every backend is full; for the whole file, a service or a model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileQueue {
    pub(super) length_max: Option<u32>,
    pub(super) timeout: Option<Span>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileDns {
    pub(super) refresh: Option<Span>,
}

/// A health check as written for the whole file, a service or a model.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileHealthCheck {
    pub(super) interval: Option<Span>,
    pub(super) jitter: Option<f64>,
    pub(super) healthy_after: Option<u32>,
    pub(super) unhealthy_after: Option<u32>,
    pub(super) timeout: Option<Span>,
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) expect_status: Option<Statuses>,
    pub(super) headers: Option<IndexMap<String, String>>,
}

/// The part of a health check that may differ between the backends of one pool.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileProbe {
    pub(super) timeout: Option<Span>,
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) expect_status: Option<Statuses>,
    pub(super) headers: Option<IndexMap<String, String>>,
}

/// Both spellings of the models' key occur in users' files.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileService {
    pub(super) addresses: Option<FileAddresses>,
    pub(super) hooks: Option<Vec<Option<FileHook>>>,
    pub(super) cache: Option<FileCaching>,
    pub(super) cors: Option<FileCors>,
    pub(super) balance: Option<FileBalance>,
    pub(super) deadlines: Option<FileDeadlines>,
    pub(super) retry: Option<FileRetry>,
    pub(super) breaker: Option<FileBreaker>,
    pub(super) queue: Option<FileQueue>,
    pub(super) health_check: Option<FileHealthCheck>,
    pub(super) models: Option<IndexMap<String, FileModel>>,
    pub(super) model: Option<IndexMap<String, FileModel>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileModel {
    pub(super) hooks: Option<Vec<Option<FileHook>>>,
    pub(super) cache: Option<FileCaching>,
    pub(super) balance: Option<FileBalance>,
    pub(super) deadlines: Option<FileDeadlines>,
    pub(super) retry: Option<FileRetry>,
    pub(super) breaker: Option<FileBreaker>,
    pub(super) queue: Option<FileQueue>,
    pub(super) health_check: Option<FileHealthCheck>,
    pub(super) backends: Option<Vec<Option<FileBackend>>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileBackend {
    pub(super) id: Option<String>,
    pub(super) name: Option<String>,
    pub(super) url: Option<String>,
    pub(super) weight: Option<f64>,
    pub(super) priority: Option<u8>,
    pub(super) model: Option<String>,
    pub(super) inflight_max: Option<u32>,
    pub(super) api_key: Option<FileSecret>,
    pub(super) api_key_file: Option<String>,
    pub(super) price: Option<FileTariff>,
    pub(super) auth_mode: Option<FileAuthMode>,
    pub(super) protocol: Option<FileProtocol>,
    pub(super) tls: Option<FileBackendTls>,
    pub(super) health_check: Option<FileProbe>,
}

/// TLS towards a backend.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileBackendTls {
    pub(super) ca_file: Option<String>,
    pub(super) cert_file: Option<String>,
    pub(super) key_file: Option<String>,
    pub(super) server_name: Option<String>,
    pub(super) verify: Option<bool>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FileProtocol {
    Http1,
    Http2,
    Auto,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FileBalance {
    Sticky,
    RoundRobin,
    LeastInflight,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FileListed {
    All,
    Healthy,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum FileAuthMode {
    Authorization,
    XApiKey,
    ApiKey,
    XGoogApiKey,
    None,
}

impl FileAuthMode {
    /// Reads a mode; header names are the same in any case.
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text.trim().to_ascii_lowercase().as_str() {
            "authorization" => Some(Self::Authorization),
            "x-api-key" => Some(Self::XApiKey),
            "api-key" => Some(Self::ApiKey),
            "x-goog-api-key" => Some(Self::XGoogApiKey),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for FileAuthMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            serde::de::Error::custom(
                "expected Authorization, x-api-key, api-key, x-goog-api-key or none",
            )
        })
    }
}

/// A secret as written.
#[derive(Clone, Debug)]
pub(super) struct FileSecret(pub(super) Secret);

impl<'de> Deserialize<'de> for FileSecret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Secret::new(text)))
    }
}

/// One text, or a list of them.
#[derive(Clone, Debug, Default)]
pub(super) struct OneOrMany {
    pub(super) items: Vec<String>,
    /// Whether a list was written, so that a problem can name the item.
    pub(super) list: bool,
}

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor;
        impl<'de> Visitor<'de> for OneOrManyVisitor {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or a list of texts")
            }

            fn visit_str<E>(self, text: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany { items: vec![text.to_owned()], list: false })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany, A::Error> {
                let items = Vec::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(OneOrMany { items, list: true })
            }
        }
        deserializer.deserialize_any(OneOrManyVisitor)
    }
}

/// One status code, or a list of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Statuses(pub(super) Vec<u16>);

impl<'de> Deserialize<'de> for Statuses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StatusesVisitor;
        impl<'de> Visitor<'de> for StatusesVisitor {
            type Value = Statuses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a status from 100 to 599 or a list of them")
            }

            fn visit_i64<E: serde::de::Error>(self, status: i64) -> Result<Statuses, E> {
                match u16::try_from(status) {
                    Ok(status @ 100..=599) => Ok(Statuses(vec![status])),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Signed(status), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Statuses, A::Error> {
                let mut statuses = Vec::new();
                while let Some(Statuses(one)) = seq.next_element()? {
                    statuses.extend(one);
                }
                Ok(Statuses(statuses))
            }
        }
        deserializer.deserialize_any(StatusesVisitor)
    }
}
