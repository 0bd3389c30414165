//! The application log, on standard error: a line for what an operator should know of.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::LevelFilter;
use serde_json::json;

use crate::config::LogFormat;

/// The application log of this process.
#[derive(Clone, Debug)]
pub struct AppLog {
    is_json: Arc<AtomicBool>,
}

impl AppLog {
    /// Begins to log. Of Pingora's own lines only those on listening are let through: others repeat request heads, and
    /// with them credentials. On exchanges and health we write our own.
    #[must_use]
    pub fn start(level: LevelFilter, format: LogFormat) -> Self {
        let is_json = Arc::new(AtomicBool::new(false));
        let log = Self { is_json: Arc::clone(&is_json) };
        env_logger::Builder::new()
            .filter_level(LevelFilter::Off)
            .filter_module("tollgate", LevelFilter::Trace)
            .filter_module("pingora_core::listeners", LevelFilter::Warn)
            .filter_module("pingora_core::services", LevelFilter::Warn)
            .format(move |out, record| {
                let time = out.timestamp_millis();
                let level = record.level();
                if is_json.load(Ordering::Relaxed) {
                    let level = level.as_str().to_ascii_lowercase();
                    let message = record.args().to_string();
                    let line =
                        json!({"time": time.to_string(), "level": level, "message": message});
                    return writeln!(out, "{line}");
                }
                writeln!(out, "{time} {level:<5} {}", record.args())
            })
            .init();
        log.configure(level, format);
        log
    }

    /// From now on, logs this much and in this way.
    pub fn configure(&self, level: LevelFilter, format: LogFormat) {
        self.is_json.store(format == LogFormat::Json, Ordering::Relaxed);
        log::set_max_level(level);
    }
}
