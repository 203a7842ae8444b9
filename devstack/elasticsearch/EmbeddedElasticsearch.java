import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Path;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import org.elasticsearch.common.logging.LogConfigurator;
import org.elasticsearch.common.settings.Settings;
import org.elasticsearch.env.Environment;
import org.elasticsearch.node.InternalSettingsPreparer;
import org.elasticsearch.node.Node;
import org.elasticsearch.plugins.PluginsLoader;

/**
 * Runs one Elasticsearch node from the jars that Maven Central serves, until the process is ended.
 *
 * <p>The arguments are the home folder (with lib, modules and plugins, never written to) and the folder that holds
 * elasticsearch.yml. Elastic's own start scripts are not published as Maven artifacts; this does what they do, without
 * the security manager of old, the keystore and the checks for production (memory locks, not root).
 *
 * <p>The jars must stand on the module path: Elasticsearch resolves its plugins' modules against the boot layer.
 */
public final class EmbeddedElasticsearch {
    private EmbeddedElasticsearch() {}

    public static void main(String[] arguments) throws Exception {
        if (arguments.length != 2) {
            throw new IllegalArgumentException("usage: EmbeddedElasticsearch HOME CONFIGURATION");
        }
        Path home = Path.of(arguments[0]);
        LogConfigurator.configureESLogging();
        Settings settings = Settings.builder().put("path.home", home.toString()).build();
        Environment environment =
                InternalSettingsPreparer.prepareEnvironment(settings, Map.of(), Path.of(arguments[1]), () -> "embedded");
        // The three-argument form makes no entitlement checks, which need an agent that Maven Central does not serve.
        PluginsLoader plugins = PluginsLoader.createPluginsLoader(
                PluginsLoader.loadModulesBundles(environment.modulesDir(), false),
                PluginsLoader.loadPluginsBundles(environment.pluginsDir(), false),
                Map.of());
        Node node = new Node(environment, plugins);
        Runtime.getRuntime().addShutdownHook(new Thread(() -> close(node), "shutdown"));
        node.start();
        new CountDownLatch(1).await(); // the node's own threads are daemons
    }

    private static void close(Node node) {
        try {
            node.close();
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        }
    }
}
