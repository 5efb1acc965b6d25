//! A CLIP bundle, loaded: images and texts to embeddings, which are not normalised.

use std::path::Path;

use recaption_export::{ClipManifest, DataType, GraphFile};

use crate::error::{Error, Result};
use crate::model::bundle::check_files;
use crate::pipeline::preprocess::{PixelFormat, PixelValues};
use crate::runtime::Device;
use crate::runtime::block::Block;
use crate::runtime::session::{Session, SessionOptions};

/// Both towers of a CLIP.
pub struct Clip {
    image_tower: Session,
    text_tower: Session,
    manifest: ClipManifest,
}

impl Clip {
    /// Loads the bundle in `folder`.
    ///
    /// # Errors
    /// [`Error::Bundle`] when it is none of kind `clip`, else those of the device and of ONNX Runtime.
    pub fn open(folder: &Path, device: Device, num_threads: usize) -> Result<Self> {
        let manifest = ClipManifest::read(folder)?;
        check_files(folder, &manifest.header.files)?;
        let options = SessionOptions::new(device, num_threads)?;
        let open = |graph: &GraphFile| Session::open(&folder.join(&graph.file), graph, &options);
        let (image_tower, text_tower) = (open(&manifest.graphs.image_tower)?, open(&manifest.graphs.text_tower)?);
        Ok(Self { image_tower, text_tower, manifest })
    }

    /// What the bundle says of itself.
    #[must_use]
    pub fn manifest(&self) -> &ClipManifest {
        &self.manifest
    }

    /// Embeddings of `images`, `[images, projection_dim]`.
    ///
    /// # Errors
    /// ONNX Runtime's.
    pub fn embed_images(&mut self, images: &[&PixelValues]) -> Result<Vec<f32>> {
        let format = PixelFormat::of_clip(&self.manifest);
        let num_values = images.len() * format.num_values();
        let mut pixel_values = Block::new(&self.image_tower, &[(self.manifest.header.pixel_values.dtype, num_values)])?;
        images.iter().enumerate().for_each(|(i, image)| image.copy_to(&mut pixel_values, i));
        let shape = [images.len(), self.manifest.projection_dim];
        let input = ("pixel_values", pixel_values, format.shape(images.len()));
        run(&mut self.image_tower, input, ("image_embeds", shape))
    }

    /// Embeddings of texts by their token ids, `[texts, projection_dim]`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a text that is empty or longer than the context, else ONNX Runtime's.
    pub fn embed_texts(&mut self, texts: &[Vec<u32>]) -> Result<Vec<f32>> {
        let Some(length) = texts.iter().map(Vec::len).max() else { return Ok(vec![]) };
        let context_length = self.manifest.text.context_length;
        if let Some(text) = texts.iter().find(|text| !(1..=context_length).contains(&text.len())) {
            return Err(Error::Setting {
                reason: format!("a text has {} tokens, the model takes 1 to {context_length}", text.len()),
                hint: "cut the text off, and keep its last token".to_owned(),
            });
        }
        // Zeros behind the end of a text have no influence, and are never taken for the end.
        let mut input_ids = Block::new(&self.text_tower, &[(DataType::I64, texts.len() * length)])?;
        for (row, text) in input_ids.tensor_mut::<i64>(0).chunks_exact_mut(length).zip(texts) {
            row.iter_mut().zip(text).for_each(|(id, &token)| *id = i64::from(token));
        }
        let shape = [texts.len(), self.manifest.projection_dim];
        run(&mut self.text_tower, ("input_ids", input_ids, vec![texts.len(), length]), ("text_embeds", shape))
    }
}

fn run(
    session: &mut Session,
    (input, mut tensor, input_shape): (&str, Block, Vec<usize>),
    (output, shape): (&str, [usize; 2]),
) -> Result<Vec<f32>> {
    let num_values = shape.iter().product();
    let mut embeds = Block::new(session, &[(DataType::F32, num_values)])?;
    let mut binding = session.binding()?;
    binding.bind_input(input, &tensor.view(0, &input_shape)?)?;
    binding.bind_output(output, embeds.view(0, &shape)?)?;
    tensor.send(session)?;
    session.run(&binding)?;
    embeds.receive_first(session, num_values)?;
    Ok(embeds.tensor::<f32>(0).to_vec())
}
