//! demo
use anyhow::Result;
/// demo
pub fn run(_port: u16) -> Result<()> {
    Ok(())
}
