//! The prompt: which template renders it, and its ids before and after the image.
//!
//! A template is, in this order: the one asked for, the checkpoint's own if it places an image, `llava-pp-llama3`.
//! Every prompt begins with exactly one BOS and holds exactly one image.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use recaption_export::PromptSettings;

use crate::error::{Error, Result};
use crate::model::tokenizer::Tokenizer;

/// The paper's prompt (arXiv 2406.08478).
pub const DEFAULT_PROMPT: &str =
    "Please generate a detailed caption of this image. Please be as descriptive as possible.";

/// Tokens that it takes in the frame that LLaMA-3 checkpoints get where they place no image, `llava-pp-llama3`: what is planned
/// for where nobody says.
pub const DEFAULT_PROMPT_TOKENS: u32 = 60;

const IMAGE: &str = "<image>";

/// A built-in template: LLaMA-3's frame around an optional system text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// LLaVA-NeXT's `llava_llama_3` conversation.
    LlavaNextLlama3,
    /// LLaVA++'s `llama3` conversation, published days before the paper's checkpoint.
    LlavaPpLlama3,
    /// No system turn.
    PlainLlama3,
}

impl Preset {
    /// All presets.
    pub const ALL: [Self; 3] = [Self::LlavaPpLlama3, Self::LlavaNextLlama3, Self::PlainLlama3];

    /// Name as `--template` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LlavaNextLlama3 => "llava-next-llama3",
            Self::LlavaPpLlama3 => "llava-pp-llama3",
            Self::PlainLlama3 => "plain-llama3",
        }
    }

    fn system(self) -> Option<&'static str> {
        match self {
            Self::LlavaNextLlama3 => Some(
                "You are a helpful language and vision assistant. You are able to understand the visual content that \
                 the user provides, and assist the user with a variety of tasks using natural language.",
            ),
            Self::LlavaPpLlama3 => Some(
                "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
                 detailed, and polite answers to the user's questions.",
            ),
            Self::PlainLlama3 => None,
        }
    }

    /// The rendered prompt, BOS included.
    #[must_use]
    pub fn render(self, prompt: &str) -> String {
        let turn = |role: &str, text: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>");
        let system = self.system().map(|text| turn("system", text)).unwrap_or_default();
        let user = turn("user", &format!("{IMAGE}\n{prompt}"));
        format!("<|begin_of_text|>{system}{user}<|start_header_id|>assistant<|end_header_id|>\n\n")
    }
}

/// Which template the user asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateChoice {
    /// A built-in one.
    Preset(Preset),
    /// A Jinja file.
    File(PathBuf),
}

impl FromStr for TemplateChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(preset) = Preset::ALL.into_iter().find(|preset| preset.name() == text) {
            return Ok(Self::Preset(preset));
        }
        if Path::new(text).is_file() {
            return Ok(Self::File(text.into()));
        }
        let names: Vec<&str> = Preset::ALL.iter().map(|preset| preset.name()).collect();
        Err(format!("expected {} or the path of a Jinja file", names.join(", ")))
    }
}

/// A prompt, ready for the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Where the template came from: a preset's name, a file, or `checkpoint`.
    pub template: String,
    /// The rendered text with its image placeholder.
    pub rendered: String,
    /// Ids before the image, BOS first.
    pub before: Vec<u32>,
    /// Ids after the image.
    pub after: Vec<u32>,
}

impl Prompt {
    /// Renders and encodes `text`.
    ///
    /// # Errors
    /// [`Error::Template`] when the template asked for does not render or does not place exactly one image.
    pub fn build(
        text: &str,
        choice: Option<&TemplateChoice>,
        settings: &PromptSettings,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        if text.trim().is_empty() {
            return Err(Error::Setting {
                reason: "the prompt is empty: the model would not be told what to write".to_owned(),
                hint: "leave --prompt out for the paper's prompt".to_owned(),
            });
        }
        if let Some(token) = [settings.image_token.as_str(), IMAGE].into_iter().find(|token| text.contains(token)) {
            return Err(Error::Setting {
                reason: format!("the prompt holds the image placeholder `{token}`"),
                hint: "leave it out: the template places the image".to_owned(),
            });
        }
        let (template, rendered) = match choice {
            Some(TemplateChoice::Preset(preset)) => (preset.name().to_owned(), preset.render(text)),
            Some(TemplateChoice::File(path)) => {
                let source = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
                let template = path.display().to_string();
                let rendered = render_chat(&source, text, settings)
                    .map_err(|reason| Error::Template { template: template.clone(), reason })?;
                (template, rendered)
            }
            None => default_rendering(text, settings),
        };
        let image = if rendered.contains(&settings.image_token) { &settings.image_token } else { IMAGE };
        let invalid = |reason: String| Error::Template { template: template.clone(), reason };
        let mut parts = rendered.split(image);
        let (Some(before), Some(after), None) = (parts.next(), parts.next(), parts.next()) else {
            let count = rendered.matches(image).count();
            return Err(invalid(format!("expected one `{image}` in the rendered prompt, got {count}")));
        };
        let mut before = tokenizer.encode(before)?;
        if let Some(bos) = settings.bos_token.as_deref().and_then(|bos| tokenizer.token_id(bos)) {
            let num_bos = before.iter().take_while(|&&id| id == bos).count();
            before.drain(..num_bos.saturating_sub(1));
            if num_bos == 0 {
                before.insert(0, bos);
            }
        }
        let after = tokenizer.encode(after)?;
        Ok(Self { template, rendered, before, after })
    }

    /// Positions the prompt takes with an image of `num_image_tokens`.
    #[must_use]
    pub fn len(&self, num_image_tokens: usize) -> usize {
        self.before.len() + num_image_tokens + self.after.len()
    }
}

/// The checkpoint's own template where it places an image, else the default preset.
fn default_rendering(text: &str, settings: &PromptSettings) -> (String, String) {
    if let Some(source) = &settings.chat_template {
        match render_with_image_part(source, text, settings) {
            Ok(rendered) if rendered.matches(&settings.image_token).count() == 1 => {
                return ("checkpoint".to_owned(), rendered);
            }
            Ok(_) => tracing::info!("the checkpoint's chat template places no image; using {}", Preset::ALL[0].name()),
            Err(reason) => {
                tracing::warn!("the checkpoint's chat template fails ({reason}); using {}", Preset::ALL[0].name());
            }
        }
    }
    let preset = Preset::LlavaPpLlama3;
    (preset.name().to_owned(), preset.render(text))
}

/// A template given by hand: the image as a content part, or, for templates that know text only, in the text.
pub(crate) fn render_chat(source: &str, text: &str, settings: &PromptSettings) -> Result<String, String> {
    match render_with_image_part(source, text, settings) {
        Ok(rendered) if rendered.contains(&settings.image_token) => Ok(rendered),
        first => {
            let content = minijinja::Value::from(format!("{}\n{text}", settings.image_token));
            render_message(source, content, settings).map_err(|reason| first.err().unwrap_or(reason))
        }
    }
}

fn render_with_image_part(source: &str, text: &str, settings: &PromptSettings) -> Result<String, String> {
    let content = minijinja::Value::from(vec![context! { type => "image" }, context! { type => "text", text => text }]);
    render_message(source, content, settings)
}

fn render_message(source: &str, content: minijinja::Value, settings: &PromptSettings) -> Result<String, String> {
    // Real templates take a few thousand instructions; loops within loops can take years.
    const MAX_INSTRUCTIONS: u64 = 1_000_000;
    let mut environment = Environment::new();
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    // As transformers configures Jinja.
    environment
        .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("bug: valid syntax"));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    let messages = vec![context! { role => "user", content => content }];
    environment
        .render_str(
            source,
            context! {
                messages => messages,
                add_generation_prompt => true,
                bos_token => settings.bos_token.as_deref().unwrap_or_default(),
                eos_token => settings.eos_token.as_deref().unwrap_or_default(),
            },
        )
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(template: Option<&str>) -> PromptSettings {
        PromptSettings {
            chat_template: template.map(str::to_owned),
            image_token: IMAGE.to_owned(),
            bos_token: Some("<|begin_of_text|>".to_owned()),
            eos_token: None,
        }
    }

    #[test]
    fn a_checkpoint_template_that_places_an_image_is_used() {
        let template = "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}\
            {% if part['type'] == 'image' %}<image>{% else %}{{ part['text'].strip() }}{% endif %}{% endfor %}{% endfor %}";
        let rendered = default_rendering(" hi ", &settings(Some(template)));
        assert_eq!(rendered, ("checkpoint".to_owned(), "<|begin_of_text|><image>hi".to_owned()));
    }

    #[test]
    fn a_text_only_checkpoint_template_gives_way_to_the_preset() {
        for template in ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{% broken"] {
            let (name, rendered) = default_rendering("hi", &settings(Some(template)));
            assert_eq!(name, "llava-pp-llama3");
            assert!(rendered.contains("<image>\nhi<|eot_id|>"));
        }
    }

    #[test]
    fn a_template_that_would_take_years_is_given_up() {
        let template = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}\
            {% endfor %}{% endfor %}";
        let reason = render_chat(template, "hi", &settings(None)).unwrap_err();
        assert!(reason.contains("out of fuel"), "{reason}");
    }

    #[test]
    fn a_text_only_template_given_by_hand_gets_the_image_in_the_text() {
        let rendered = render_chat("USER: {{ messages[0]['content'] }}", "hi", &settings(None));
        assert_eq!(rendered.as_deref(), Ok("USER: <image>\nhi"));
    }
}
