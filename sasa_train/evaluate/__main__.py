from sasa_train.evaluate import main

main()
