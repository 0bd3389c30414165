//! The least that Pingora can do: one upstream, no rule.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use pingora::modules::http::HttpModules;
use pingora_core::Result;
use pingora_core::apps::HttpServerOptions;
use pingora_core::listeners::tls::TlsSettings;
use pingora_core::server::Server;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

struct Bare {
    upstream: SocketAddr,
}

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    fn init_downstream_modules(&self, _modules: &mut HttpModules) {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream, false, String::new())))
    }
}

/// Serves until the process is ended, with as many threads as there are cores and all else as Pingora has it; over TLS
/// with the certificate and key in `folder`, if there is one.
pub(crate) fn serve(address: SocketAddr, upstream: SocketAddr, folder: Option<&str>) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let configuration = ServerConf { threads, ..ServerConf::default() };
    let mut server = Server::new_with_opt_and_conf(None, configuration);
    server.bootstrap();
    let configuration = Arc::clone(&server.configuration);
    let mut service = http_proxy_service(&configuration, Bare { upstream });
    if let Some(proxy) = service.app_logic_mut() {
        let mut options = HttpServerOptions::default();
        options.h2c = folder == Some("h2c");
        proxy.server_options = Some(options);
    }
    match folder.filter(|folder| *folder != "h2c") {
        Some(folder) => {
            let (certificate, key) = (format!("{folder}/cert.pem"), format!("{folder}/key.pem"));
            let settings = TlsSettings::intermediate(&certificate, &key).expect("a certificate");
            service.add_tls_with_settings(&address.to_string(), None, settings);
        }
        None => service.add_tcp(&address.to_string()),
    }
    server.add_service(service);
    server.run_forever();
}
